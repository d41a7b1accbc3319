"""Samples from files in batches that the model takes, or made from a seed."""

import io
import zipfile

import numpy as np
import onnx
import onnx.numpy_helper
import pytest

from onnx_ocs.errors import BadSamples
from onnx_ocs.graph.samples import GUESSES, Guess, Input, generate, read_samples

IMAGE = Input("x", "tensor(float)", ("N", 3))
TOKENS = Input("ids", "tensor(int64)", ("N", "length"))
FIXED = Input("x", "tensor(float)", (4, 3))
SCALAR = Input("x", "tensor(float)", ())


def values(count, dtype=np.float32):
    return np.arange(count * 3).reshape(count, 3).astype(dtype)


def read(path, *inputs, **options):
    return list(read_samples(path, list(inputs), **options))


def sizes(batches):
    return [len(batch.feed["x"]) for batch in batches]


def together(batches, name="x"):
    return np.concatenate([batch.feed[name] for batch in batches])


# -- read -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize(("batch", "wanted"), [(32, [10]), (4, [4, 4, 2]), (1, [1] * 10), (10, [10])])
def test_an_archive_is_read_in_batches(batch, wanted, compressed, tmp_path):
    save = np.savez_compressed if compressed else np.savez
    save(tmp_path / "s.npz", x=values(10), other=np.ones(3))
    batches = read(tmp_path / "s.npz", IMAGE, batch=batch)
    assert sizes(batches) == wanted
    np.testing.assert_array_equal(together(batches), values(10))
    assert {batch.labels is None for batch in batches} == {True}
    assert [list(batch.feed) for batch in batches] == [["x"]] * len(wanted)


def test_an_array_alone_is_for_the_only_input(tmp_path):
    np.save(tmp_path / "s.npy", values(5))
    batches = read(tmp_path / "s.npy", IMAGE, batch=2)
    assert sizes(batches) == [2, 2, 1]
    np.testing.assert_array_equal(together(batches), values(5))


@pytest.mark.parametrize("name", ["label", "labels"])
def test_labels_go_with_their_samples(name, tmp_path):
    np.savez(tmp_path / "s.npz", x=values(5), **{name: np.array([3, 1, 4, 1, 5])})
    batches = read(tmp_path / "s.npz", IMAGE, batch=2)
    assert [batch.labels.tolist() for batch in batches] == [[3, 1], [4, 1], [5]]


@pytest.mark.parametrize("limit", [1, 2, 3, 4, 9, 10, 99])
def test_no_more_samples_than_the_limit(limit, tmp_path):
    np.savez(tmp_path / "s.npz", x=values(10), labels=np.arange(10))
    batches = read(tmp_path / "s.npz", IMAGE, batch=4, limit=limit)
    np.testing.assert_array_equal(together(batches), values(min(limit, 10)))
    assert [label for batch in batches for label in batch.labels] == list(range(min(limit, 10)))


@pytest.mark.parametrize("limit", [3, 5, 6, 8, 20])
def test_the_limit_counts_over_the_files_of_a_folder(limit, tmp_path):
    for name, count in (("a", 5), ("b", 1), ("c", 7)):
        np.save(tmp_path / f"{name}.npy", values(count))
    batches = read(tmp_path, IMAGE, batch=2, limit=limit)
    assert sum(sizes(batches)) == min(limit, 13)


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path):
    (tmp_path / "sub").mkdir()
    np.save(tmp_path / "b.npy", values(2) + 100)
    np.savez(tmp_path / "a.npz", x=values(3))
    np.save(tmp_path / "sub" / "c.npy", values(1) + 200)
    (tmp_path / "readme.txt").write_text("not a sample")
    batches = read(tmp_path, IMAGE)
    assert [batch.feed["x"][0, 0] for batch in batches] == [0, 100, 200]


def test_test_data_of_onnx_is_one_batch_for_each_folder(tmp_path):
    for number in range(2):
        folder = tmp_path / f"test_data_set_{number}"
        folder.mkdir()
        for index, array in enumerate([values(2) + number, np.full((2, 5), number)]):
            tensor = onnx.numpy_helper.from_array(array)
            (folder / f"input_{index}.pb").write_bytes(tensor.SerializeToString())
        (folder / "output_0.pb").write_bytes(b"")
    batches = read(tmp_path, IMAGE, TOKENS)
    assert [list(batch.feed) for batch in batches] == [["x", "ids"]] * 2
    for number, batch in enumerate(batches):
        np.testing.assert_array_equal(batch.feed["x"], values(2) + np.float32(number))
        np.testing.assert_array_equal(batch.feed["ids"], np.full((2, 5), number))
    assert len(read(tmp_path / "test_data_set_1", IMAGE, TOKENS)) == 1


def test_a_fixed_batch_takes_whole_batches_only(tmp_path):
    np.save(tmp_path / "s.npy", values(10))
    batches = read(tmp_path / "s.npy", FIXED)
    assert sizes(batches) == [4, 4]
    np.testing.assert_array_equal(together(batches), values(8))


def test_an_array_of_one_dimension_more_holds_whole_inputs(tmp_path):
    stacked = np.arange(36).reshape(3, 4, 3).astype(np.float32)
    np.save(tmp_path / "s.npy", stacked)
    batches = read(tmp_path / "s.npy", FIXED)
    assert [batch.feed["x"].tolist() for batch in batches] == stacked.tolist()
    assert len(read(tmp_path / "s.npy", FIXED, limit=2)) == 2


def test_an_input_without_dimensions_takes_one_entry_at_a_time(tmp_path):
    np.save(tmp_path / "s.npy", np.arange(3, dtype=np.float32))
    batches = read(tmp_path / "s.npy", SCALAR)
    assert [batch.feed["x"].shape for batch in batches] == [()] * 3
    assert [float(batch.feed["x"]) for batch in batches] == [0, 1, 2]


def test_several_inputs_are_read_side_by_side(tmp_path):
    ids = np.arange(14).reshape(7, 2)
    np.savez(tmp_path / "s.npz", ids=ids, x=values(7))
    batches = read(tmp_path / "s.npz", IMAGE, TOKENS, batch=3)
    assert sizes(batches) == [3, 3, 1]
    np.testing.assert_array_equal(together(batches, "ids"), ids)
    np.testing.assert_array_equal(together(batches), values(7))


@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("float16", np.float16), ("double", np.float64), ("int8", np.int8), ("uint8", np.uint8), ("bool", np.bool_)],
)
def test_arrays_of_every_type_of_input_are_read(kind, dtype, tmp_path):
    np.save(tmp_path / "s.npy", values(4, dtype))
    (batch,) = read(tmp_path / "s.npy", Input("x", f"tensor({kind})", (None, 3)))
    assert batch.feed["x"].dtype == dtype
    np.testing.assert_array_equal(batch.feed["x"], values(4, dtype))


# -- what does not fit ------------------------------------------------------------------------------------------------


def refused(path, *inputs, match):
    with pytest.raises(BadSamples, match=match) as caught:
        read(path, *inputs)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_is_told(tmp_path):
    refused(tmp_path / "s.npz", IMAGE, match="no such file")


def test_a_folder_without_samples_is_told(tmp_path):
    (tmp_path / "readme.txt").write_text("none")
    refused(tmp_path, IMAGE, match="holds no")


def test_a_file_of_another_kind_is_told(tmp_path):
    (tmp_path / "s.csv").write_text("1,2,3")
    refused(tmp_path / "s.csv", IMAGE, match="npz")


def test_an_archive_without_the_input_is_told_with_what_it_has(tmp_path):
    np.savez(tmp_path / "s.npz", image=values(2), more=values(2))
    refused(tmp_path / "s.npz", IMAGE, match="'x'.*image, more")


def test_one_array_for_two_inputs_is_told(tmp_path):
    np.save(tmp_path / "s.npy", values(2))
    refused(tmp_path / "s.npy", IMAGE, TOKENS, match="2 inputs")


@pytest.mark.parametrize("dtype", [np.float64, np.float16, np.int64, np.uint8, ">f4"])
def test_a_wrong_type_is_told(dtype, tmp_path):
    np.savez(tmp_path / "s.npz", x=values(2, dtype))
    refused(tmp_path / "s.npz", IMAGE, match="'x' takes float32")


@pytest.mark.parametrize("shape", [(2, 4), (2,), (), (2, 2, 4), (2, 3, 1, 1)], ids=str)
def test_a_wrong_shape_is_told(shape, tmp_path):
    np.savez(tmp_path / "s.npz", x=np.zeros(shape, np.float32))
    refused(tmp_path / "s.npz", IMAGE, match=r"'x' takes shape \['\?', 3\]")


def test_different_numbers_of_samples_are_told(tmp_path):
    np.savez(tmp_path / "s.npz", x=values(3), ids=np.zeros((4, 2), np.int64))
    refused(tmp_path / "s.npz", IMAGE, TOKENS, match="different numbers")


def test_a_missing_tensor_of_test_data_is_told(tmp_path):
    (tmp_path / "input_0.pb").write_bytes(onnx.numpy_helper.from_array(values(2)).SerializeToString())
    with pytest.raises(BadSamples, match=r"input_1\.pb.*'ids'"):
        read(tmp_path, IMAGE, TOKENS)


@pytest.mark.parametrize("content", [b"", b"\xff" * 30, b"text"], ids=["empty", "noise", "text"])
def test_a_damaged_tensor_of_test_data_is_told(content, tmp_path):
    (tmp_path / "input_0.pb").write_bytes(content)
    refused(tmp_path, IMAGE, match=r"input_0\.pb")


@pytest.mark.parametrize("array", [values(2, np.float64), np.zeros((2, 5), np.float32)], ids=["type", "shape"])
def test_a_tensor_of_test_data_that_does_not_fit_is_told(array, tmp_path):
    (tmp_path / "input_0.pb").write_bytes(onnx.numpy_helper.from_array(array).SerializeToString())
    refused(tmp_path, IMAGE, match=r"input_0\.pb.*'x' takes")


@pytest.mark.parametrize(
    "content",
    [b"", b"PK\x03\x04", b"\x93NUMPY", b"\x93NUMPY\x01\x00\xff\xff{", b"text" * 99],
    ids=["empty", "zip", "npy", "header", "text"],
)
@pytest.mark.parametrize("suffix", ["npy", "npz"])
def test_a_damaged_file_is_told(suffix, content, tmp_path):
    (tmp_path / f"s.{suffix}").write_bytes(content)
    refused(tmp_path / f"s.{suffix}", IMAGE, match="cannot be read")


@pytest.mark.parametrize("cut", [1, 12, 100, 115, 130])
def test_an_array_that_is_cut_short_is_told(cut, tmp_path):
    buffer = io.BytesIO()
    np.save(buffer, values(4))
    (tmp_path / "s.npy").write_bytes(buffer.getvalue()[:-cut])
    refused(tmp_path / "s.npy", IMAGE, match="cannot be read")


def test_an_archive_of_something_else_is_told(tmp_path):
    with zipfile.ZipFile(tmp_path / "s.npz", "w") as archive:
        archive.writestr("x.npy", "no array")
    refused(tmp_path / "s.npz", IMAGE, match="cannot be read")


def test_python_objects_are_never_unpickled(tmp_path):
    np.save(tmp_path / "s.npy", np.array([print, 1], object), allow_pickle=True)
    refused(tmp_path / "s.npy", IMAGE, match="Python objects")


def test_an_array_in_fortran_order_is_told_with_the_remedy(tmp_path):
    np.save(tmp_path / "s.npy", np.asfortranarray(values(4)))
    refused(tmp_path / "s.npy", IMAGE, match="ascontiguousarray")


def test_a_type_without_samples_is_told(tmp_path):
    np.save(tmp_path / "s.npy", values(4))
    with pytest.raises(BadSamples, match=r"'x'.*float8"):
        read(tmp_path / "s.npy", Input("x", "tensor(float8e4m3fn)", ("N", 3)))


# -- generate ---------------------------------------------------------------------------------------------------------


def made(*inputs, guess=GUESSES[0], bounds=None, seed=0):
    return generate(list(inputs), guess, bounds or {}, np.random.default_rng(seed))


def test_the_seed_decides_the_samples():
    first, again, other = (made(IMAGE, TOKENS, bounds={"ids": 1000}, seed=seed) for seed in (7, 7, 8))
    for name in ("x", "ids"):
        np.testing.assert_array_equal(first[name], again[name])
        assert (first[name] != other[name]).any()


def test_dimensions_of_one_name_are_of_one_size():
    inputs = [
        Input("a", "tensor(float)", ("N", "length", "length")),
        Input("b", "tensor(float)", ("length", "N")),
        Input("c", "tensor(float)", (None, None, 5)),
    ]
    feed = made(*inputs, guess=Guess(3, 7, 2))
    assert {name: array.shape for name, array in feed.items()} == {"a": (3, 7, 7), "b": (7, 3), "c": (3, 7, 5)}


@pytest.mark.parametrize("guess", GUESSES, ids=str)
def test_every_guess_gives_samples_that_fit(guess):
    inputs = [IMAGE, TOKENS, Input("flag", "tensor(bool)", ()), Input("h", "tensor(float16)", (2, -1))]
    feed = made(*inputs, guess=guess)
    assert list(feed) == ["x", "ids", "flag", "h"]
    assert feed["x"].shape == (guess.batch, 3)
    assert feed["ids"].shape == (guess.batch, guess.size)
    assert [array.dtype for array in feed.values()] == [item.dtype for item in inputs]
    assert all(np.isfinite(feed[name]).all() for name in ("x", "h"))
    if guess.positive:
        assert (feed["x"] >= 0).all()


@pytest.mark.parametrize("kind", ["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"])
@pytest.mark.parametrize("bound", [1, 2, 100])
def test_integers_stay_below_the_length_of_their_table(kind, bound):
    item = Input("i", f"tensor({kind})", (40, 50))
    array = made(item, bounds={"i": bound})["i"]
    assert array.dtype == np.dtype(kind)
    assert (array.min(), array.max()) == (0, bound - 1)


def test_integers_of_no_table_stay_below_the_guess():
    array = made(Input("i", "tensor(int64)", (40, 50)), guess=Guess(1, 1, 4))["i"]
    assert np.unique(array).tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "item", [Input("flag", "tensor(bool)", (2, 3)), Input("attention_mask", "tensor(int64)", (2, 3))]
)
def test_flags_and_masks_let_everything_through(item):
    array = made(item)[item.name]
    assert array.dtype == item.dtype
    assert array.all()


def test_texts_are_texts():
    array = made(Input("t", "tensor(string)", (2, 2)))["t"]
    assert array.shape == (2, 2)
    assert {type(text) for text in array.ravel()} == {str}


def test_a_type_that_cannot_be_made_is_told():
    with pytest.raises(BadSamples, match="'s' is of type seq"):
        made(Input("s", "seq(tensor(float))", ()))


def test_a_fixed_batch_is_read_whole_whatever_the_batch_and_the_limit(tmp_path):
    np.save(tmp_path / "a.npy", np.arange(24, dtype=np.float32).reshape(12, 2))
    item = Input("x", "tensor(float)", (12, 2))
    for batch, limit in ((8, None), (32, None), (8, 4)):
        (found,) = read_samples(tmp_path / "a.npy", [item], batch, limit)
        assert (found.count, found.feed["x"].shape) == (12, (12, 2))


def test_arrays_whose_first_axes_mean_different_things_are_one_feed(tmp_path):
    inputs = [
        Input("x", "tensor(float)", ("N", 2)),
        Input("c", "tensor(bool)", ()),
        Input("h", "tensor(float)", (3, 2)),
    ]
    feed = {"x": np.ones((5, 2), np.float32), "c": np.array(True), "h": np.ones((3, 2), np.float32)}
    np.savez(tmp_path / "a.npz", **feed)
    (found,) = read_samples(tmp_path / "a.npz", inputs)
    for name, values in feed.items():
        np.testing.assert_array_equal(found.feed[name], values)
    inputs[2] = Input("h", "tensor(float)", ("N", 2))
    with pytest.raises(BadSamples, match="different numbers of samples"):
        list(read_samples(tmp_path / "a.npz", inputs))
