"""Reading checkpoint files: plain data in every form it comes in, and nothing else, whatever a file tries."""

import collections
import contextlib
import copyreg
import io
import logging
import os
import pickle
import struct
import sys
import zipfile
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch


sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "conversion"))

from safe_pickle import UnsafeCheckpointError, load_state_dict


ARRAYS = {
    "float": np.arange(6, dtype=np.float32).reshape(2, 3),
    "column order": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "big endian": np.arange(3, dtype=">f4"),
    "half": np.ones(2, np.float16),
    "whole": np.arange(-2, 2),
    "truth": np.array([True, False]),
    "number": np.float32(2.5),
    "no dimension": np.array(3, dtype=np.int64),
    "empty": np.zeros((0, 4), np.float32),
}


# From protocol 4 on a name is preceded by its length, so it can't just be replaced; the older ones show the renaming.
@pytest.mark.parametrize(
    ("protocol", "numpy_1_names"),
    [*((protocol, False) for protocol in range(6)), *((protocol, True) for protocol in range(4))],
)
def test_arrays_of_every_protocol_and_numpy_version_are_read(tmp_path, protocol, numpy_1_names):
    content = pickle.dumps({"model": OrderedDict(ARRAYS), "author": "x"}, protocol=protocol)
    if numpy_1_names:
        content = content.replace(b"numpy._core.", b"numpy.core.")
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    parameters = load_state_dict(path)
    assert list(parameters) == list(ARRAYS)
    for name, value in ARRAYS.items():
        assert np.array_equal(parameters[name], value) and parameters[name].shape == value.shape
        assert parameters[name].dtype == value.dtype.newbyteorder("=")


def test_state_dict_with_metadata_or_without_a_model_entry(tmp_path):
    state_dict = OrderedDict(a=np.ones(2, np.float32))
    state_dict._metadata = OrderedDict([("", {"version": 2})])
    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps(state_dict))
    assert list(load_state_dict(path)) == ["a"]


class Payload:
    """Calls `function(*arguments)` when it is unpickled by a reader that lets it."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("suffix", [".pkl", ".pth"])
@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("system", lambda marker: Payload(os.system, f"touch '{marker}'")),
        ("exec", lambda marker: Payload(exec, f"open({str(marker)!r}, 'w')")),
        ("open", lambda marker: Payload(open, str(marker), "w")),
    ],
)
def test_payload_of_a_malicious_checkpoint_never_runs(tmp_path, name, make, suffix):
    marker = tmp_path / "executed"
    content = {"model": {"weight": np.ones(2, np.float32), "evil": make(marker)}}
    path = tmp_path / f"model{suffix}"
    if suffix == ".pkl":
        path.write_bytes(pickle.dumps(content))
    else:
        content["model"]["weight"] = torch.ones(2)
        torch.save(content, path)
    with pytest.raises(UnsafeCheckpointError, match=name):
        load_state_dict(path)
    assert not marker.exists()

    if suffix == ".pkl":  # the payload is a live one
        pickle.loads(path.read_bytes())
    else:
        torch.load(path, weights_only=False)
    assert marker.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"ccollections\nOrderedDict\n}S'x'\nI1\nsb.", "no state"),  # sets an attribute on what it may call
        (pickle.dumps({"model": {"a": np.array([None])}}), "plain numbers"),
        (pickle.dumps({"model": {"a": np.ones(2, np.complex64)}}), "plain numbers"),
        (pickle.dumps({"model": {"a": torch.ones(2)}}), "torch"),
        (pickle.dumps({"model": {"a": "text"}}), "'a' is a str"),
        (pickle.dumps({"model": {}}), "no parameters"),
        (pickle.dumps([1, 2]), "no parameters"),
        (b"cos\nsystem\n.", "os.system"),
        (b"P1\n.", "PERSID"),
        (b"\x80\x02K\x01Q.", "outside"),
        (pickle.dumps({"model": {"a": np.ones(9)}})[:-40], "damaged"),
        (b"hello", "damaged"),
        (b"", "damaged"),
    ],
)
def test_anything_but_plain_parameters_is_refused(tmp_path, content, message):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_state_dict(path)


def test_missing_and_damaged_files_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere\.pkl"):
        load_state_dict(tmp_path / "nowhere.pkl")
    torch.save({"model": {"a": torch.ones(500)}}, tmp_path / "model.pth")
    content = (tmp_path / "model.pth").read_bytes()
    (tmp_path / "model.pth").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match="damaged"):
        load_state_dict(tmp_path / "model.pth")


def test_torch_archive_under_a_pickles_name_is_read(tmp_path):
    torch.save({"model": {"a": torch.arange(3)}}, tmp_path / "model.pkl")
    assert torch.equal(load_state_dict(tmp_path / "model.pkl")["a"], torch.arange(3))


# --- the content decides how a file is read ---


def torch_file(contents: dict, **options) -> bytes:
    buffer = io.BytesIO()
    torch.save(contents, buffer, **options)
    return buffer.getvalue()


def npz_file() -> bytes:
    buffer = io.BytesIO()
    np.savez(buffer, a=np.ones(2))
    return buffer.getvalue()


WEIGHTS = {"a": np.arange(6, dtype=np.float32).reshape(2, 3), "counter": np.array(3, dtype=np.int64)}
TENSORS = {name: torch.from_numpy(value.copy()) for name, value in WEIGHTS.items()}
STATE = {"lr": np.float64(0.1), "milestones": collections.Counter([3]), "moments": np.ones(4)}


@pytest.mark.parametrize("suffix", [".pkl", ".pth", ".bin"])
@pytest.mark.parametrize(
    "content",
    [
        pickle.dumps({"model": WEIGHTS}),
        pickle.dumps(WEIGHTS, protocol=0),
        torch_file({"model": TENSORS, "scheduler": STATE, "iteration": 5}),
        torch_file({"model": WEIGHTS}),
        torch_file({"model": {name: torch.nn.Parameter(v, requires_grad=False) for name, v in TENSORS.items()}}),
        torch_file({"model": TENSORS}, _use_new_zipfile_serialization=False),
    ],
    ids=["arrays", "arrays, protocol 0", "torch", "arrays in torch's archive", "parameters", "torch before 1.6"],
)
def test_every_format_is_read_under_every_name(tmp_path, content, suffix):
    path = tmp_path / f"model{suffix}"
    path.write_bytes(content)
    parameters = load_state_dict(path)
    assert list(parameters) == list(WEIGHTS)
    for name, value in WEIGHTS.items():
        assert np.asarray(parameters[name]).tobytes() == value.tobytes()
        assert np.asarray(parameters[name]).dtype == value.dtype and tuple(parameters[name].shape) == value.shape


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"\0" * 257 + b"ustar" + b"\0" * 500, "tar archive"),
        (npz_file(), "no checkpoint"),
        (b"PK\x03\x04" + b"\0" * 100, "no checkpoint"),
        (torch_file({"model": {"a": torch.eye(3).to_sparse()}}), "'a' is no plain tensor"),
        (torch_file({"model": {"a": torch.ones(2, dtype=torch.complex64)}}), "'a' is no plain tensor"),
        (torch_file({"model": {"a": torch.ones(2, device="meta")}}), "'a' is no plain tensor"),
        (torch_file({"model": {"a": torch.tensor([1.0, float("nan")])}}), "'a' has values that are not finite"),
        (pickle.dumps({"model": {"b": np.array([np.inf])}}), "'b' has values that are not finite"),
        (pickle.dumps({"model": {3: np.ones(1)}}), "is a int, not text"),
    ],
)
def test_what_cannot_be_a_model_is_refused(tmp_path, content, message):
    path = tmp_path / "model.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        load_state_dict(path)


def test_warning_names_the_weights_taken_of_several(tmp_path, caplog):
    ours, averaged = {"a": torch.zeros(2)}, {"a": torch.ones(2)}
    path = tmp_path / "model.pth"
    with caplog.at_level(logging.WARNING):
        torch.save({"model": ours, "optimizer": {"state": {}}, "ema_state": averaged}, path)
        assert torch.equal(load_state_dict(path)["a"], ours["a"])
        assert "averaged weights under 'ema_state' and others under 'model', which are taken" in caplog.text
        caplog.clear()
        # The way out that the warning gives is one that works.
        torch.save(torch.load(path, weights_only=True)["ema_state"], tmp_path / "averaged.pth")
        assert torch.equal(load_state_dict(tmp_path / "averaged.pth")["a"], averaged["a"])
        torch.save({"state_dict": ours, "epoch": 3}, path)
        assert torch.equal(load_state_dict(path)["a"], ours["a"])
        assert caplog.text == ""
        torch.save({"ema_state": averaged, "iteration": 3}, path)
        assert torch.equal(load_state_dict(path)["a"], averaged["a"])
        assert "no 'model': the averaged weights under 'ema_state' are taken" in caplog.text


# --- files made by hand ---


def text(value: str) -> bytes:
    return b"X" + struct.pack("<I", len(value)) + value.encode()


def number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def archive(data: bytes, compression: int = zipfile.ZIP_STORED, **members: bytes) -> bytes:
    """A file in torch's format around a pickle."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", compression) as file:
        for name, content in {"data.pkl": data, "version": b"3", "byteorder": b"little", **members}.items():
            file.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def tensor_pickle(stored: int, size: tuple[int, ...], stride: tuple[int, ...], offset: int = 0) -> bytes:
    """A dictionary with one float tensor over the storage `data/0`, as torch writes it."""
    storage = b"((" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu") + number(stored) + b"tQ"
    shape, steps = (b"(" + b"".join(map(number, values)) + b"t" for values in (size, stride))
    tensor = b"ctorch._utils\n_rebuild_tensor_v2\n" + storage + number(offset) + shape + steps
    return b"\x80\x02}" + text("a") + tensor + b"\x89ccollections\nOrderedDict\n)RtRs."


def code(kind: str, command: str) -> bytes:
    """A pickle that calls `os.system(command)`, each kind by another way to name and call a function."""
    quoted = repr(command).encode()
    return {
        "global": b"cos\nsystem\n(S" + quoted + b"\ntR.",
        "stack global": b"\x80\x04" + text("os") + text("system") + b"\x93" + text(command) + b"\x85R.",
        "inst": b"(S" + quoted + b"\nios\nsystem\n.",
        "obj": b"(cos\nsystem\nS" + quoted + b"\no.",
        "extension": b"\x80\x02\x82\xfbX" + struct.pack("<I", len(command)) + command.encode() + b"\x85R.",
        "build": (b"\x80\x02ccollections\nOrderedDict\n)R}" + text("items") + b"cos\nsystem\n(S" + quoted + b"\ntRsb."),
        "reconstructor": (
            b"ccopyreg\n_reconstructor\n(cbuiltins\nobject\ncbuiltins\nobject\ncos\nsystem\n(S" + quoted + b"\ntRtR."
        ),
        "argument of an array": (
            b"cnumpy.core.multiarray\n_reconstruct\n(cos\nsystem\n(S" + quoted + b"\ntR(I0\ntS'b'\ntR."
        ),
    }[kind]


@pytest.fixture
def registered_extension():
    """Number 251 stands for `os.system` in pickles of this process."""
    copyreg.add_extension("os", "system", 251)
    yield
    copyreg.remove_extension("os", "system", 251)


@pytest.mark.parametrize("wrapped", [False, True], ids=["pickle", "torch archive"])
@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("global", "os.system"),
        ("stack global", "os.system|STACK_GLOBAL"),
        ("inst", "os.system|INST os system"),
        ("obj", "os.system|OBJ"),
        ("extension", "EXT1"),
        ("build", "os.system"),
        ("reconstructor", "copyreg._reconstructor"),
        ("argument of an array", "os.system"),
    ],
)
def test_no_way_to_call_a_function_works(tmp_path, registered_extension, kind, message, wrapped):
    marker = tmp_path / "executed"
    content = code(kind, f"touch '{marker}'")
    path = tmp_path / "model.pkl"
    path.write_bytes(archive(content) if wrapped else content)
    with pytest.raises(UnsafeCheckpointError, match=message):
        load_state_dict(path)
    assert not marker.exists()

    with contextlib.suppress(TypeError):  # the payload is a live one, whatever comes after it
        pickle.loads(content)
    assert marker.exists()


ORDERED = b"\x80\x02ccollections\nOrderedDict\n)R"


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04" + text("collections") + text("OrderedDict.fromkeys.__globals__") + b"\x93.",
        b"\x80\x04" + text("numpy") + text("ndarray.__class__") + b"\x93.",
        b"cbuiltins\ngetattr\n.",
        b"ctorch._utils\n_rebuild_tensor_v2\n)R.",
        b"ctorch.storage\n_load_from_bytes\n(S'x'\ntR.",
        b"cnumpy.core.multiarray\nscalar\n(cnumpy\ndtype\n(S'O8'\ntRNtR.",
        b"cnumpy\ndtype\n(S'(1000000,1000000)f4'\ntR.",
        pickle.dumps({"a": np.array([os.system], dtype=object)}),
        pickle.dumps({"a": np.zeros(2, dtype="f4,f4")}),
        torch_file({"a": np.array([os.system], dtype=object)}),
        b"\x80\x05\x97.",
        b"\x80\x02)2\x86.",
    ],
    ids=[
        "dotted name", "dotted class", "getattr", "torch in a plain pickle", "bytes to load", "object scalar",
        "nested type", "object array", "record array", "object array in torch's archive", "outside buffer", "copies",
    ],
)  # fmt: skip
def test_gadgets_are_refused(tmp_path, content):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(UnsafeCheckpointError):
        load_state_dict(path)


@pytest.mark.parametrize(
    ("state", "message"),
    [
        (b"N}" + text("__class__") + text("x") + b"s\x86b.", "__class__"),
        (b"N}" + text("__class__") + b"ccollections\nOrderedDict\ns\x86b.", "__class__"),
        (b"K\x01K\x02b.", "not a dictionary"),
        (b"}" + text("append") + b"ccollections\nOrderedDict\nsbK\x01a.", "no checkpoint"),
        (b"}" + text("items") + b"K\x01sb.", "no parameters"),
    ],
)
def test_state_set_on_a_dictionary_changes_nothing_that_is_used(tmp_path, state, message):
    path = tmp_path / "model.pkl"
    path.write_bytes(ORDERED + state)
    with pytest.raises(ValueError, match=message):
        load_state_dict(path)


NESTED = b"\x80\x02}()" + b"\x85" * 100_000 + b"K\x01u."  # hashing such a key overflows the stack


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (NESTED, "nests tuples"),
        (b"\x80\x02}()" + b"\x85" * 60 + b"q\x00h\x00" + b"\x85" * 60 + b"K\x01u.", "nests tuples"),
        (archive(NESTED), "nests tuples"),
        (torch_file({}, _use_new_zipfile_serialization=False)[:15] + b"\x80\x02K\x01." * 2 + NESTED, "nests tuples"),
        (b"\x80\x02}r" + struct.pack("<I", 2**31 - 1) + b".", "memo number"),
        (b"}p99999999999\n.", "memo number"),
        (archive(tensor_pickle(1, (10**6, 10**6), (0, 0)), **{"data/0": b"\0" * 4}), "claims the shape"),
        (archive(tensor_pickle(2, (2,), (1,)), zipfile.ZIP_DEFLATED, **{"data/0": b"\0" * 8}), "compressed"),
    ],
    ids=["key", "by way of the memo", "in an archive", "torch before 1.6", "memo", "memo as text", "stride", "zip"],
)
def test_files_that_would_exhaust_memory_or_stack_are_refused(tmp_path, content, message):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(UnsafeCheckpointError, match=message):
        load_state_dict(path)


@pytest.mark.parametrize(
    "content",
    [
        b"\x80\x04\x8e" + struct.pack("<Q", 10**12) + b"abc.",
        b"\x80\x05\x96" + struct.pack("<Q", 10**12) + b"abc.",
        b"\x80\x04\x8d" + struct.pack("<Q", 2**63 - 1) + b"abc.",
        b"\x80\x04\x95" + struct.pack("<Q", 10**13) + b"}.",
        b"L" + b"9" * 100_000 + b"L\n.",
        pickle.dumps({"a": np.ones(2, np.float32)}).replace(b"K\x02\x85", b"J\xff\xff\xff\x7f\x85"),
        archive(tensor_pickle(10**12, (10**12,), (1,)), **{"data/0": b"\0" * 4}),
        archive(tensor_pickle(2, (10**12,), (1,)), **{"data/0": b"\0" * 8}),
        archive(tensor_pickle(2, (2,), (1,), -4), **{"data/0": b"\0" * 8}),
    ],
    ids=["bytes", "byte array", "text", "frame", "digits", "shape", "storage", "size", "offset"],
)
def test_sizes_beyond_the_file_are_refused(tmp_path, content):
    path = tmp_path / "model.pkl"
    path.write_bytes(content)
    with pytest.raises(ValueError, match="damaged or no checkpoint"):
        load_state_dict(path)


def test_hand_made_archive_is_read_where_nothing_is_wrong_with_it(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(archive(tensor_pickle(2, (2,), (1,)), **{"data/0": np.float32([1, 2]).tobytes()}))
    assert torch.equal(load_state_dict(path)["a"], torch.tensor([1.0, 2.0]))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_damage_anywhere_is_recognised(tmp_path):
    """One byte in many places is changed: the file is read, or refused with a reason, never anything else."""
    path = tmp_path / "model"
    contents = [
        pickle.dumps({"model": OrderedDict(a=np.ones(3, np.float32))}, protocol=2),
        pickle.dumps({"model": {"a": np.ones(3, np.float32)}}, protocol=4),
        torch_file({"model": {"a": torch.ones(3)}}, _use_new_zipfile_serialization=False),
    ]
    generator = np.random.default_rng(0)
    for content in contents:
        for position in range(0, len(content), 2):
            damaged = bytearray(content)
            damaged[position] = generator.integers(256)
            path.write_bytes(damaged)
            try:
                assert set(load_state_dict(path)) != set()
            except ValueError as error:
                assert str(error)
