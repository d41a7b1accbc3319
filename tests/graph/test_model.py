"""A model in, the same model out: nothing that the source holds is lost, and no file is trusted."""

import shutil

import numpy as np
import onnx
import onnx.external_data_helper
import onnx.numpy_helper
import onnx.parser
import pytest

from onnx_ocs.errors import CannotWrite, UnsupportedModel
from onnx_ocs.graph.editor import Editor
from onnx_ocs.graph.model import SMALL, Model, tensors

TENSOR = onnx.TensorProto

PLAIN = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,3] x) => (float[2,3] y) <float[3] w = {1, 2, 3}> { y = Add(x, w) }"""

BODIES = """<ir_version: 10, opset_import: ["" : 21, "local" : 1], domain: "org.example", model_version: 7,
 producer_name: "someone", producer_version: "3", doc_string: "what it is for", metadata_props: ["author": "me"]>
g (float[2,3] x, bool c) => (float[2,3] y) <float[3] w = {1, 2, 3}, float[3] unused = {7, 8, 9}, float[2,3] t> {
  [first] t = Add (x, w)
  [choice] y = If (c) <
    then_branch = yes () => (float[2,3] p) { p = Mul(t, w) },
    else_branch = no () => (float[2,3] q) <float[3] k = {4, 5, 6}> { r = local.f(t) q = Sub(r, k) }>
}
<domain: "local", opset_import: ["" : 21]>
f (a) => (b) { k = Constant <value = float[1] {2}> () s = Mul(a, k) b = Relu(s) }"""

IR_3 = """<ir_version: 3, opset_import: ["" : 9]>
g (float[2,3] x, float[3] w) => (float[2,3] y) <float[3] w = {1, 2, 3}> { y = Add(x, w) }"""


def parsed(text):
    return onnx.parser.parse_model(text)


def told(entries, key, value):
    entries.add(key=key, value=value)


def documented():
    model = parsed(BODIES)
    graph = model.graph
    graph.doc_string = "about the graph"
    told(graph.metadata_props, "of", "graph")
    for index, node in enumerate(graph.node):
        node.doc_string = f"node {index}"
        told(node.metadata_props, "of", f"node {index}")
    for value in (*graph.input, *graph.output, *graph.value_info):
        value.doc_string = f"value {value.name}"
        told(value.metadata_props, "of", value.name)
    for tensor in graph.initializer:
        tensor.doc_string = f"tensor {tensor.name}"
        told(tensor.metadata_props, "of", tensor.name)
    graph.node[0].attribute.add(name="note", type=onnx.AttributeProto.STRING, s=b"x", doc_string="why")
    body = graph.node[1].attribute[0].g
    body.doc_string = "a branch"
    told(body.node[0].metadata_props, "of", "a node of a branch")
    told(model.functions[0].metadata_props, "of", "function")
    model.functions[0].doc_string = "a function"
    model.functions[0].node[0].doc_string = "a node of a function"
    return model


def annotated():
    model = parsed(PLAIN)
    note = model.graph.quantization_annotation.add(tensor_name="w")
    told(note.quant_parameter_tensor_names, "SCALE_TENSOR", "scale")
    kind = model.graph.input[0].type
    kind.denotation = "TENSOR"
    kind.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    kind.tensor_type.shape.dim[0].dim_param = "N"
    return model


def all_attributes():
    """A node of a foreign domain with an attribute of every type."""
    model = parsed(PLAIN)
    model.opset_import.add(domain="foreign", version=3)
    node = model.graph.node.add(op_type="Anything", domain="foreign", name="any", overload="third", output=["any"])
    inner = parsed(BODIES).graph
    numbers = onnx.numpy_helper.from_array(np.arange(4, dtype=np.float32), "numbers")
    sparse = onnx.helper.make_sparse_tensor(
        onnx.helper.make_tensor("values", TENSOR.FLOAT, [2], [1.0, 2.0]),
        onnx.helper.make_tensor("indices", TENSOR.INT64, [2], [1, 3]),
        [5],
    )
    kind = onnx.helper.make_tensor_type_proto(TENSOR.FLOAT, ["N", 3])
    values = {
        "f": 0.5, "i": 3, "s": "text", "t": numbers, "g": inner, "sparse": sparse, "type": kind, "fs": [0.5, 1.5],
        "is": [1, 2], "ss": ["a", "b"], "ts": [numbers, numbers], "gs": [inner, inner], "sparses": [sparse, sparse],
        "types": [kind, onnx.helper.make_sequence_type_proto(kind)],
    }  # fmt: skip
    node.attribute.extend(onnx.helper.make_attribute(name, value) for name, value in values.items())
    assert len({attribute.type for attribute in node.attribute}) == 14
    return model


def overloaded():
    model = parsed(BODIES)
    other = model.functions.add()
    other.CopyFrom(model.functions[0])
    other.overload = "other"
    other.attribute.append("plain")
    other.attribute_proto.append(onnx.helper.make_attribute("scale", np.float32(2)))
    table = onnx.numpy_helper.from_array(np.arange(1024, dtype=np.float32), "table")
    other.attribute_proto.append(onnx.helper.make_attribute("table", table))
    other.value_info.add(name="s")
    use = model.graph.node.add(op_type="f", domain="local", overload="other", input=["x"], output=["z"])
    use.name = "overloaded"
    return model


def sparse_weights():
    model = parsed(PLAIN)
    values = onnx.numpy_helper.from_array(np.arange(600, dtype=np.float32), "sparse")
    indices = onnx.numpy_helper.from_array(np.arange(600, dtype=np.int64), "")
    model.graph.sparse_initializer.append(onnx.helper.make_sparse_tensor(values, indices, [1000]))
    return model


def trained():
    model = parsed(PLAIN)
    info = model.training_info.add()
    info.initialization.CopyFrom(parsed(PLAIN).graph)
    info.algorithm.CopyFrom(parsed(BODIES).graph)
    info.algorithm.initializer.append(onnx.numpy_helper.from_array(np.arange(900, dtype=np.float32), "rate"))
    told(info.update_binding, "w", "rate")
    return model


def typed_fields():
    """Values in the fields of their types, as make_tensor writes them, below and beyond the size that is detached."""
    model = parsed(PLAIN)
    for count in (6, 2 * SMALL):
        rows = {
            TENSOR.FLOAT: np.arange(count) / 2, TENSOR.DOUBLE: np.arange(count) / 2, TENSOR.INT64: np.arange(count),
            TENSOR.INT32: -np.arange(count), TENSOR.UINT64: np.arange(count), TENSOR.FLOAT16: np.arange(count) % 7,
            TENSOR.INT8: np.arange(count) % 7, TENSOR.BOOL: np.arange(count) % 2, TENSOR.BFLOAT16: np.ones(count),
            TENSOR.COMPLEX64: np.arange(count) * 1j, TENSOR.COMPLEX128: np.arange(count) * 1j,
            TENSOR.FLOAT8E4M3FNUZ: np.ones(count), TENSOR.INT4: np.arange(count) % 7,
            TENSOR.UINT4: np.arange(count) % 7,
        }  # fmt: skip
        for kind, values in rows.items():
            model.graph.initializer.append(onnx.helper.make_tensor(f"{kind}.{count}", kind, [count], values.tolist()))
        texts = [b"text"] * count
        model.graph.initializer.append(onnx.helper.make_tensor(f"text.{count}", TENSOR.STRING, [count], texts))
    return model


SUB_BYTE = {"INT4": 4, "UINT4": 4, "INT2": 2, "UINT2": 2, "FLOAT4E2M1": 4}
ONE_BYTE = ("FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ", "FLOAT8E8M0", "INT8", "UINT8")


def narrow():
    """Raw values of all narrow types, small and large, of an odd number of elements."""
    model, rng = parsed(PLAIN), np.random.default_rng(0)
    for name, bits in {**SUB_BYTE, **dict.fromkeys(ONE_BYTE, 8)}.items():
        for count in (3, 9001):
            raw = bytearray(rng.integers(0, 256, -(-count * bits // 8), np.uint8).tobytes())
            made = TENSOR(name=f"{name}.{count}", data_type=TENSOR.DataType.Value(name), dims=[count])
            made.raw_data = bytes(raw)
            model.graph.initializer.append(made)
    return model


def large():
    """Payloads beyond 1 KiB wherever a tensor may be."""
    model = parsed(BODIES)

    def big(name, seed):
        return onnx.numpy_helper.from_array(np.random.default_rng(seed).standard_normal((20, 30), np.float32), name)

    model.graph.initializer.append(big("big", 0))
    told(model.graph.initializer[-1].metadata_props, "of", "big")
    model.graph.initializer[-1].doc_string = "a large one"
    constant = model.graph.node.add(op_type="Constant", name="made", output=["made"])
    constant.attribute.append(onnx.helper.make_attribute("value", big("", 1)))
    body = next(a.g for node in model.graph.node if node.op_type == "If" for a in node.attribute)
    body.initializer.append(big("inside", 2))
    value = next(a for node in model.functions[0].node for a in node.attribute if a.name == "value")
    value.t.CopyFrom(big("in a function", 3))
    several = model.graph.node.add(op_type="Many", domain="local", name="many", output=["many"])
    several.attribute.append(onnx.helper.make_attribute("ts", [big("a", 4), big("b", 5)]))
    return model


SOURCES = {
    "plain": lambda: parsed(PLAIN),
    "bodies and functions": lambda: parsed(BODIES),
    "documented": documented,
    "annotated": annotated,
    "attributes of all types": all_attributes,
    "overloads": overloaded,
    "sparse": sparse_weights,
    "training": trained,
    "typed fields": typed_fields,
    "narrow": narrow,
    "large": large,
    "IR 3": lambda: parsed(IR_3),
}


def held(model):
    """The tensors of a model, without the empty ones that stand for an attribute's missing sparse tensor."""
    return [tensor for tensor in tensors(model) if tensor.data_type]


def assert_same(found, wanted):
    """Equal to the last bit, those of a NaN included."""
    assert found.dtype == wanted.dtype
    assert found.shape == wanted.shape
    if wanted.dtype == object:
        assert found.tolist() == wanted.tolist()
    else:
        assert found.tobytes() == wanted.tobytes()


@pytest.fixture(params=SOURCES)
def source(request):
    return SOURCES[request.param]()


@pytest.mark.parametrize("edited", [False, True], ids=["loaded", "loaded and committed"])
def test_an_unedited_model_is_saved_as_it_was(source, edited, tmp_path):
    onnx.save(source, tmp_path / "in.onnx")
    model = Model.load(tmp_path / "in.onnx")
    if edited:
        Editor(model).commit()
    model.save(tmp_path / "out.onnx")
    after = onnx.ModelProto.FromString((tmp_path / "out.onnx").read_bytes())
    assert after == source
    assert after.SerializeToString(deterministic=True) == source.SerializeToString(deterministic=True)
    assert [file.name for file in sorted(tmp_path.iterdir())] == ["in.onnx", "out.onnx"]


def test_a_file_saved_unedited_has_the_same_bytes(source, tmp_path):
    (tmp_path / "in.onnx").write_bytes(source.SerializeToString(deterministic=True))
    Model.load(tmp_path / "in.onnx").save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == (tmp_path / "in.onnx").read_bytes()


def test_fields_this_version_does_not_know_are_kept(tmp_path):
    unknown = b"\xfa\x3f\x03new"  # field 1023, of three bytes
    known = large().SerializeToString(deterministic=True)
    (tmp_path / "in.onnx").write_bytes(known + unknown)
    model = Model.load(tmp_path / "in.onnx")
    Editor(model).commit()
    model.save(tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == known + unknown


@pytest.mark.parametrize("edited", [False, True], ids=["loaded", "loaded and committed"])
def test_a_proto_that_is_given_is_not_modified(source, edited):
    before = source.SerializeToString(deterministic=True)
    model = Model.load(source)
    if edited:
        editor = Editor(model)
        editor.raise_ir(13)
        editor.commit()
    model.proto.graph.name = "changed"
    assert source.SerializeToString(deterministic=True) == before


def test_the_size_of_a_model_is_known_before_it_is_written(source):
    model = Model.load(source)
    assert model.nbytes() == len(model.whole().SerializeToString(deterministic=True))
    assert model.whole() == source


def test_the_bare_model_holds_no_large_payload():
    bare = Model.load(large()).bare()
    assert bare.ByteSize() < 3 * SMALL
    assert [t.name for t in tensors(bare)] == [t.name for t in tensors(large())]
    assert [node.name for node in bare.graph.node] == [node.name for node in large().graph.node]


def test_every_tensor_of_a_model_reads_as_in_the_source(source):
    model = Model.load(source)
    wanted = [onnx.numpy_helper.to_array(tensor) for tensor in held(source)]
    found = [model.read(tensor) for tensor in held(model.proto)]
    for before, after in zip(wanted, found, strict=True):
        assert_same(after, before)


def test_large_payloads_are_views_of_the_source(tmp_path):
    onnx.save(large(), tmp_path / "in.onnx")
    model = Model.load(tmp_path / "in.onnx")
    (big,) = (tensor for tensor in model.proto.graph.initializer if tensor.name == "big")
    values = model.read(big)
    assert not values.flags.owndata
    assert not values.flags.writeable
    assert model.proto.ByteSize() < 3 * SMALL


# -- external data ---------------------------------------------------------------------------------------------------


def moved_out(source, folder, **options):
    """``source`` as a file of the folder, all of its raw data beside it."""
    copy = onnx.ModelProto()
    copy.CopyFrom(source)
    options = {"size_threshold": 0, "location": "in.data", "convert_attribute": True, **options}
    onnx.save(copy, folder / "in.onnx", save_as_external_data=True, **options)
    return folder / "in.onnx"


def assert_equal_values(path, wanted):
    """The tensors of the file ``path``, read by onnx, are those of ``wanted``."""
    found = onnx.load(path, load_external_data=False)
    for after, before in zip(held(found), held(wanted), strict=True):
        if after.data_location == TENSOR.EXTERNAL:
            onnx.external_data_helper.load_external_data_for_tensor(after, str(path.parent))
        assert (after.name, after.data_type) == (before.name, before.data_type)
        assert_same(onnx.numpy_helper.to_array(after), onnx.numpy_helper.to_array(before))


def without_locations(model):
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    for tensor in tensors(copy):
        for field in ("data_location", "external_data", "raw_data", "float_data", "double_data"):
            tensor.ClearField(field)
    return copy


def test_external_data_in_is_embedded_out(source, tmp_path):
    path = moved_out(source, tmp_path)
    Model.load(path).save(tmp_path / "out.onnx")
    after = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert all(tensor.data_location == TENSOR.DEFAULT for tensor in tensors(after))
    assert_equal_values(tmp_path / "out.onnx", source)
    assert without_locations(after) == without_locations(source)


def test_embedded_in_is_external_out(source, tmp_path):
    Model.load(source).save(tmp_path / "out.onnx", external=True)
    assert_equal_values(tmp_path / "out.onnx", source)
    bare = onnx.load(tmp_path / "out.onnx", load_external_data=False)
    assert without_locations(bare) == without_locations(source)
    assert not any(entry.key.startswith("onnx_ocs") for tensor in tensors(bare) for entry in tensor.external_data)


def test_external_in_external_out_and_back(tmp_path):
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
    path = moved_out(large(), tmp_path / "first")
    Model.load(path).save(tmp_path / "second" / "m.onnx", external=True)
    shutil.rmtree(tmp_path / "first")
    again = Model.load(tmp_path / "second" / "m.onnx")
    assert again.whole() == large()


def test_external_weights_are_aligned_and_in_one_file(tmp_path):
    Model.load(large()).save(tmp_path / "m.onnx", external=True)
    bare = onnx.load(tmp_path / "m.onnx", load_external_data=False)
    entries = [{e.key: e.value for e in t.external_data} for t in tensors(bare) if t.external_data]
    assert len(entries) == 6
    assert len({entry["location"] for entry in entries}) == 1
    assert all(int(entry["offset"]) % 64 == 0 for entry in entries)


def test_the_file_of_weights_is_named_by_its_content(tmp_path):
    other = large()
    next(t for t in other.graph.initializer if t.name == "big").raw_data = bytes(2400)
    data = []
    for folder, model in (("a", large()), ("b", large()), ("c", other)):
        (tmp_path / folder).mkdir()
        Model.load(model).save(tmp_path / folder / "m.onnx", external=True)
        data.append(next((tmp_path / folder).glob("*.data")).name)
    assert data[0] == data[1]
    assert data[0] != data[2]


def test_several_models_of_one_folder_keep_their_own_weights(tmp_path):
    saved = {}
    for number, name in enumerate(["m.onnx", "n.onnx", "m.other.onnx"]):
        saved[name] = large()
        next(t for t in saved[name].graph.initializer if t.name == "big").raw_data = bytes([number]) * 2400
        Model.load(saved[name]).save(tmp_path / name, external=True)
    for name, model in saved.items():
        assert Model.load(tmp_path / name).whole() == model


def test_a_second_write_leaves_the_weights_of_the_first(tmp_path):
    Model.load(large()).save(tmp_path / "m.onnx", external=True)
    kept = (tmp_path / "m.onnx").read_bytes()
    other = large()
    next(t for t in other.graph.initializer if t.name == "big").raw_data = bytes(2400)
    Model.load(other).save(tmp_path / "m.onnx", external=True)
    assert Model.load(tmp_path / "m.onnx").whole() == other
    (tmp_path / "m.onnx").write_bytes(kept)
    assert Model.load(tmp_path / "m.onnx").whole() == large()


def test_a_model_may_be_saved_in_its_own_place(tmp_path):
    path = moved_out(large(), tmp_path)
    for external in (True, False, False):
        Model.load(path).save(path, external)
        assert Model.load(path).whole() == large()


# -- files that are not to be trusted ---------------------------------------------------------------------------------


def refused(path, match=None):
    with pytest.raises(UnsupportedModel, match=match) as caught:
        Model.load(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content", [None, b"", b"\x00", b"not a model\n", b"\x08\x0a", b"\x80" * 40, b"PK\x03\x04" * 9]
)
def test_a_file_that_is_no_model_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "m.onnx").write_bytes(content)
    refused(tmp_path / "m.onnx")


def test_a_folder_is_no_model(tmp_path):
    refused(tmp_path)


@pytest.mark.parametrize(
    "text", ["import numpy as np\n", '{"model": 1}', "<html></html>", "version https://git-lfs.github.com/spec/v1\noid"]
)
def test_a_text_file_is_refused(text, tmp_path):
    (tmp_path / "m.onnx").write_text(text)
    refused(tmp_path / "m.onnx")


def test_a_model_cut_short_anywhere_is_refused(tmp_path):
    model = large()
    data = model.SerializeToString(deterministic=True)
    head = onnx.ModelProto()
    head.CopyFrom(model)
    for field in ("opset_import", "metadata_props", "functions"):
        head.ClearField(field)
    end = head.ByteSize()  # all fields up to the graph, which a cut behind it would leave whole
    assert data[:end] == head.SerializeToString(deterministic=True)
    for length in [*range(60), *range(60, end, 37), end - 2, end - 1]:
        (tmp_path / "m.onnx").write_bytes(data[:length])
        refused(tmp_path / "m.onnx")


@pytest.mark.parametrize("dims", [[20, 31], [20, 29], [-20, 30], [20, 30, 2], []], ids=str)
def test_a_payload_of_the_wrong_size_is_refused(dims, tmp_path):
    model = large()
    big = next(tensor for tensor in model.graph.initializer if tensor.name == "big")
    big.dims[:] = dims
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    refused(tmp_path / "m.onnx", match="'big'")


def located(path, **entries):
    """The file's model with other entries for the external data of its one weight."""
    model = onnx.load(path, load_external_data=False)
    (weight,) = (tensor for tensor in model.graph.initializer if tensor.name == "big")
    for entry in weight.external_data:
        entry.value = str(entries.pop(entry.key, entry.value))
    for key, value in entries.items():
        weight.external_data.add(key=key, value=str(value))
    path.write_bytes(model.SerializeToString())


@pytest.fixture
def outside(tmp_path):
    """A model in a folder of its own, and its weights beside that folder."""
    folder = tmp_path / "folder"
    folder.mkdir()
    path = moved_out(large(), folder)
    shutil.copy(folder / "in.data", tmp_path / "secret.data")
    return path


@pytest.mark.parametrize(
    "location", ["../secret.data", "./../secret.data", "sub/../../secret.data", "{folder}/secret.data", "", ".."]
)
def test_external_data_outside_of_the_folder_is_refused(location, outside, tmp_path):
    located(outside, location=location.format(folder=tmp_path))
    refused(outside, match="'big'")


def test_an_absolute_path_is_refused_even_into_the_folder(outside):
    located(outside, location=outside.parent / "in.data")
    refused(outside, match="'big'")


def test_a_link_out_of_the_folder_is_refused(outside, tmp_path):
    (outside.parent / "link.data").symlink_to(tmp_path / "secret.data")
    located(outside, location="link.data")
    refused(outside, match="'big'")


def test_a_link_of_a_folder_out_of_the_folder_is_refused(outside, tmp_path):
    (outside.parent / "link").symlink_to(tmp_path, target_is_directory=True)
    located(outside, location="link/secret.data")
    refused(outside, match="'big'")


def test_a_folder_below_the_model_and_links_within_it_are_fine(outside):
    (outside.parent / "sub").mkdir()
    (outside.parent / "in.data").rename(outside.parent / "sub" / "in.data")
    (outside.parent / "in.data").symlink_to("sub/in.data")
    assert Model.load(outside).whole() == large()


def test_a_model_reached_by_a_link_finds_its_weights(outside, tmp_path):
    (tmp_path / "link").symlink_to(outside.parent, target_is_directory=True)
    assert Model.load(tmp_path / "link" / "in.onnx").whole() == large()


@pytest.mark.parametrize(
    "entries",
    [
        {"location": "missing.data"},
        {"offset": 10**9},
        {"offset": -1},
        {"offset": "here"},
        {"length": "long"},
        {"length": 2399},
        {"length": 2401},
        {"length": 10**30},
    ],
    ids=str,
)
def test_external_data_that_does_not_fit_its_file_is_refused(entries, outside):
    located(outside, **entries)
    refused(outside, match="'big'")


@pytest.mark.parametrize("content", [b"x", b"x" * 2399], ids=len)
def test_external_data_that_is_too_short_is_refused(content, outside):
    (outside.parent / "in.data").write_bytes(content)
    refused(outside)


def test_external_data_that_is_empty_is_refused(outside):
    (outside.parent / "in.data").write_bytes(b"")
    with pytest.raises(UnsupportedModel, match=r"in\.data"):
        Model.load(outside)


def test_a_folder_as_external_data_is_refused(outside):
    (outside.parent / "sub").mkdir()
    located(outside, location="sub")
    refused(outside, match="'big'")


def test_a_proto_whose_weights_are_elsewhere_is_refused(outside):
    proto = onnx.load(outside, load_external_data=False)
    with pytest.raises(UnsupportedModel, match="path of the model"):
        Model.load(proto)


def test_a_reference_of_our_own_in_a_file_is_not_followed(outside):
    model = onnx.load(outside, load_external_data=False)
    big = next(tensor for tensor in model.graph.initializer if tensor.name == "big")
    del big.external_data[:]
    told(big.external_data, "onnx_ocs.blob", "0")
    outside.write_bytes(model.SerializeToString())
    refused(outside, match="'big'")


def test_saving_to_a_folder_that_is_missing_is_refused(tmp_path):
    for external in (False, True):
        with pytest.raises(CannotWrite, match="nowhere"):
            Model.load(large()).save(tmp_path / "nowhere" / "m.onnx", external)
