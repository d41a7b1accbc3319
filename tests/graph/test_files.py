"""Files are replaced whole or not at all."""

import os
import stat

import numpy as np
import onnx
import onnx.numpy_helper
import onnx.parser
import pytest

from onnx_ocs.errors import CannotWrite, UnsupportedModel
from onnx_ocs.graph import files, wire
from onnx_ocs.graph.model import Model
from onnx_ocs.graph.wire import Lazy

MODEL = """<ir_version: 10, opset_import: ["" : 21]>
g (float[2,400] x) => (float[2,400] y) { y = Add(x, w) }"""


def weighted(value):
    model = onnx.parser.parse_model(MODEL)
    model.graph.initializer.append(onnx.numpy_helper.from_array(np.full(400, value, np.float32), "w"))
    return model


def listed(folder):
    return sorted(file.name for file in folder.iterdir())


def failing(error):
    yield memoryview(b"x" * 2**17)
    raise error


@pytest.mark.parametrize("write", [files.write, files.write_data])
@pytest.mark.parametrize("error", [ValueError("a bug"), MemoryError(), KeyboardInterrupt()], ids=repr)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(write, error, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(type(error)):
        write(tmp_path / "m.onnx", failing(error))
    assert listed(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_a_full_disk_is_told_and_leaves_the_old_file(tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"old")
    with pytest.raises(CannotWrite, match=r"m\.onnx.*No space left"):
        files.write(tmp_path / "m.onnx", failing(OSError(28, "No space left on device")))
    assert listed(tmp_path) == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_bytes() == b"old"


def test_the_old_file_stands_until_all_is_written(tmp_path):
    target = tmp_path / "m.onnx"
    target.write_bytes(b"old")
    seen = []

    def watching():
        for piece in (b"n" * 2**18, b"e" * 2**18, b"w" * 2**18):
            seen.append(target.read_bytes())
            yield memoryview(piece)

    files.write(target, watching())
    assert seen == [b"old"] * 3
    assert target.read_bytes() == b"n" * 2**18 + b"e" * 2**18 + b"w" * 2**18


@pytest.mark.parametrize(
    "sizes", [[], [0], [1, 2, 3], [2**16 - 1, 2**16, 2**16 + 1], [5, 2**24 + 3, 0, 7], [2**15] * 40], ids=str
)
def test_pieces_of_all_sizes_arrive_in_order(sizes, tmp_path, rng):
    pieces = [rng.bytes(size) for size in sizes]
    lazy = [Lazy(len(p), lambda p=p: p) if i % 2 else memoryview(p) for i, p in enumerate(pieces)]
    files.write(tmp_path / "m.onnx", lazy)
    assert (tmp_path / "m.onnx").read_bytes() == b"".join(pieces)
    name = files.write_data(tmp_path / "m.onnx", iter(lazy))
    assert (tmp_path / name).read_bytes() == b"".join(pieces)


def test_lazy_payloads_are_made_one_after_the_other(tmp_path):
    made = []

    def chunks():
        for index in range(4):
            assert made == list(range(index))
            yield Lazy(2**17, lambda index=index: made.append(index) or bytes([index]) * 2**17)

    files.write(tmp_path / "m.onnx", chunks())
    assert (tmp_path / "m.onnx").read_bytes() == b"".join(bytes([i]) * 2**17 for i in range(4))


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_permissions_of_the_old_file_stay(mode, tmp_path):
    (tmp_path / "m.onnx").write_bytes(b"old")
    (tmp_path / "m.onnx").chmod(mode)
    files.write(tmp_path / "m.onnx", [memoryview(b"new")])
    assert stat.S_IMODE((tmp_path / "m.onnx").stat().st_mode) == mode


def test_a_new_file_has_the_permissions_of_any_new_file(tmp_path):
    (tmp_path / "usual").write_bytes(b"")
    name = files.write_data(tmp_path / "m.onnx", [memoryview(b"new")])
    files.write(tmp_path / "m.onnx", [memoryview(b"new")])
    usual = stat.S_IMODE((tmp_path / "usual").stat().st_mode)
    assert {stat.S_IMODE((tmp_path / file).stat().st_mode) for file in ("m.onnx", name)} == {usual}


@pytest.mark.parametrize("external", [False, True])
def test_a_folder_is_no_target(external, tmp_path):
    (tmp_path / "m.onnx").mkdir()
    with pytest.raises(CannotWrite, match="folder"):
        Model.load(weighted(1)).save(tmp_path / "m.onnx", external)
    with pytest.raises(CannotWrite, match="folder"), files.workplace(tmp_path / "m.onnx"):
        pass
    assert listed(tmp_path) == ["m.onnx"]
    assert listed(tmp_path / "m.onnx") == []


@pytest.mark.skipif(os.getuid() == 0, reason="root may write everywhere")
def test_a_folder_that_may_not_be_written_is_told(tmp_path):
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(CannotWrite, match=r"m\.onnx"):
            files.write(tmp_path / "m.onnx", [memoryview(b"new")])
    finally:
        tmp_path.chmod(0o700)


def test_a_file_in_place_of_the_folder_is_told(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(CannotWrite, match=r"m\.onnx"):
        files.write(tmp_path / "file" / "m.onnx", [memoryview(b"new")])
    with pytest.raises(CannotWrite, match=r"m\.onnx"), files.workplace(tmp_path / "file" / "m.onnx"):
        pass


@pytest.mark.parametrize("external", [False, True])
def test_a_model_still_in_use_may_be_replaced_in_place(external, tmp_path):
    path = tmp_path / "m.onnx"
    onnx.save(weighted(3), path)
    model = Model.load(path)
    (weight,) = model.proto.graph.initializer
    values = model.read(weight)
    model.save(path, external)
    assert (values == 3).all()
    assert Model.load(path).whole() == weighted(3)
    onnx.save(weighted(5), tmp_path / "other.onnx")
    Model.load(tmp_path / "other.onnx").save(path, external)
    assert (values == 3).all()
    assert model.whole() == weighted(3)
    assert Model.load(path).whole() == weighted(5)


def test_a_workplace_is_beside_its_target_and_gone_afterwards(tmp_path):
    with files.workplace(tmp_path / "m.onnx") as folder:
        assert folder.parent == tmp_path
        Model.load(weighted(2)).save(folder / "m.onnx", external=True)
        files.publish(folder / "m.onnx", tmp_path / "m.onnx")
    assert len(listed(tmp_path)) == 2
    assert Model.load(tmp_path / "m.onnx").whole() == weighted(2)


def test_publishing_keeps_permissions_and_follows_links(tmp_path):
    (tmp_path / "real.onnx").write_bytes(b"old")
    (tmp_path / "real.onnx").chmod(0o600)
    (tmp_path / "link.onnx").symlink_to("real.onnx")
    with files.workplace(tmp_path / "link.onnx") as folder:
        Model.load(weighted(2)).save(folder / "link.onnx")
        files.publish(folder / "link.onnx", tmp_path / "link.onnx")
    assert (tmp_path / "link.onnx").is_symlink()
    assert stat.S_IMODE((tmp_path / "real.onnx").stat().st_mode) == 0o600
    assert Model.load(tmp_path / "real.onnx").whole() == weighted(2)


def test_publishing_onto_a_folder_is_told(tmp_path):
    (tmp_path / "m.onnx").mkdir()
    with files.workplace(None) as folder:
        files.write(folder / "m.onnx", [memoryview(b"new")])
        with pytest.raises(CannotWrite, match=r"m\.onnx"):
            files.publish(folder / "m.onnx", tmp_path / "m.onnx")


def test_a_workplace_is_gone_where_an_interrupt_comes_as_it_is_made(tmp_path, monkeypatch):
    def interrupted(folder, mode):
        os.mkdir(folder, mode)
        raise KeyboardInterrupt

    monkeypatch.setattr(files.Path, "mkdir", interrupted)
    with pytest.raises(KeyboardInterrupt), files.workplace(tmp_path / "m.onnx"):
        pass
    assert listed(tmp_path) == []


def test_a_workplace_leaves_a_folder_of_its_name_that_stands_there(tmp_path, monkeypatch):
    monkeypatch.setattr(files.secrets, "token_hex", lambda size: "taken")
    (tmp_path / ".onnx-ocs-taken").mkdir()
    with pytest.raises(CannotWrite, match="exists"), files.workplace(tmp_path / "m.onnx"):
        pass
    assert listed(tmp_path) == [".onnx-ocs-taken"]


def test_links_in_a_circle_are_told(tmp_path):
    (tmp_path / "a").symlink_to("a")
    with pytest.raises(CannotWrite, match=r"a/m\.onnx"), files.workplace(tmp_path / "a" / "m.onnx"):
        pass
    with pytest.raises(UnsupportedModel, match=r"a/m\.onnx"):
        Model.load(tmp_path / "a" / "m.onnx")


def test_a_workplace_is_cleaned_up_after_an_error(tmp_path):
    def fails():
        with files.workplace(tmp_path / "m.onnx") as folder:
            (folder / "half").write_bytes(b"x")
            raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        fails()
    assert listed(tmp_path) == []


@pytest.mark.parametrize("limit", [0, 1, 1000, 3000, 10**6])
def test_a_spool_keeps_every_payload_wherever_it_is(limit, monkeypatch, rng):
    monkeypatch.setattr(files, "IN_MEMORY", limit)
    spool = files.Spool()
    payloads = [rng.bytes(size) for size in (1, 999, 1000, 4096, 4097, 7, 2**17)]
    kept = [spool.keep(payload) for payload in payloads]
    assert [bytes(view) for view in wire.buffers(kept)] == payloads
    assert [view.nbytes for view in kept] == [len(payload) for payload in payloads]


def test_payloads_beyond_the_limit_of_memory_reach_the_file(monkeypatch, tmp_path, rng):
    monkeypatch.setattr(files, "IN_MEMORY", 5000)
    model = Model.load(weighted(1))
    payloads = [rng.bytes(4096) for _ in range(5)]
    for index, payload in enumerate(payloads):
        model.proto.graph.initializer.append(model.tensor(f"n{index}", onnx.TensorProto.UINT8, (4096,), payload))
    for external in (False, True):
        model.save(tmp_path / "m.onnx", external)
        found = onnx.load(tmp_path / "m.onnx").graph.initializer
        assert [tensor.raw_data for tensor in found][1:] == payloads


def test_a_map_of_nothing_is_refused(tmp_path):
    (tmp_path / "empty").write_bytes(b"")
    for name in ("empty", "missing", "."):
        with pytest.raises(UnsupportedModel, match=str(tmp_path)):
            files.map_file(tmp_path / name)
