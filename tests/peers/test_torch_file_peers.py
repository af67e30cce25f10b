"""Files that torch itself writes, in both of its forms: every value arrives bit for bit."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from mesh_transformer.checkpoint.torch_file import TorchFile
from mesh_transformer.config.errors import CheckpointError

if importlib.util.find_spec("torch"):  # where it is missing these are only collected; run, they fail
    import torch

# Deprecations inside torch are its own to mend.
pytestmark = [pytest.mark.peers, pytest.mark.filterwarnings("ignore")]

FLOATS = {"float32": np.float32, "float16": np.float16, "bfloat16": ml_dtypes.bfloat16, "float64": np.float64}
INTS = {"int64": np.int64, "int32": np.int32, "int16": np.int16, "int8": np.int8, "uint8": np.uint8}
both_forms = pytest.mark.parametrize("zip_form", [True, False], ids=["zip", "old"])


def numpy_of(tensor) -> np.ndarray:
    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()


def check(path: Path, state, zip_form: bool, **options) -> TorchFile:
    torch.save(state, path, _use_new_zipfile_serialization=zip_form, **options)
    file = TorchFile(path)
    assert list(file.tensors) == list(state)
    for name, tensor in state.items():
        want, got = numpy_of(tensor), file.read(name)
        assert file.tensors[name].shape == got.shape == tuple(tensor.shape), name
        assert file.tensors[name].dtype == got.dtype == want.dtype, name
        assert got.flags.c_contiguous and got.dtype.isnative, name
        assert got.tobytes() == want.tobytes(), name
    return file


def mixed(dtype: str) -> dict:
    torch.manual_seed(7)
    base = torch.randn(6, 8, dtype=torch.float64).to(getattr(torch, dtype))
    tied = torch.nn.Parameter(torch.randn(5, 3).to(getattr(torch, dtype)))
    return {
        "weight": torch.nn.Parameter(base.clone()),
        "frozen": torch.nn.Parameter(base.clone(), requires_grad=False),
        "transposed": base.T,
        "rows": base[2:4],
        "columns": base[:, 3:7:2],
        "permuted": torch.arange(24).to(getattr(torch, dtype)).reshape(2, 3, 4).permute(2, 0, 1),
        "scalar": base[1, 1],
        "empty": torch.zeros(3, 0, dtype=getattr(torch, dtype)),
        "tied": tied,
        "tied_too": tied,
        "attn.bias": torch.tril(torch.ones(4, 4, dtype=torch.bool)).view(1, 1, 4, 4),
        "masked_bias": torch.tensor(-1e9),
        "position_ids": torch.arange(9).expand((1, -1)),
        "special": torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0, 1e-7]).to(getattr(torch, dtype)),
    }


@both_forms
@pytest.mark.parametrize("dtype", FLOATS)
def test_floats_views_parameters_and_buffers(tmp_path: Path, dtype: str, zip_form: bool) -> None:
    file = check(tmp_path / "pytorch_model.bin", mixed(dtype), zip_form)
    assert file.tensors["weight"].dtype == FLOATS[dtype]


@both_forms
def test_integers(tmp_path: Path, zip_form: bool) -> None:
    check(tmp_path / "i.bin", {name: torch.arange(-3, 5).to(getattr(torch, name)) for name in INTS}, zip_form)


@both_forms
@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_modules_state_dict_and_every_pickle_protocol(tmp_path: Path, zip_form: bool, protocol: int) -> None:
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.LayerNorm(4))
    check(tmp_path / "m.bin", module.state_dict(), zip_form, pickle_protocol=protocol)


@both_forms
def test_gptj_as_transformers_names_it(tmp_path: Path, zip_form: bool) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.GPTJConfig(n_layer=2, n_embd=32, n_head=2, vocab_size=64, n_positions=16, rotary_dim=8)
    state = transformers.GPTJForCausalLM(config).half().state_dict()
    file = check(tmp_path / "pytorch_model.bin", state, zip_form)
    assert file.tensors["transformer.h.1.mlp.fc_in.weight"].shape == (128, 32)


@both_forms
def test_harmless_entries_are_left_out_and_the_name_of_the_file_does_not_matter(tmp_path: Path, zip_form: bool) -> None:
    state = {"epoch": 3, "w": torch.ones(2), "lr": 0.5, "name": "x", "none": None, "done": True}
    path = tmp_path / "step 1.ünicode.pt"
    torch.save(state, path, _use_new_zipfile_serialization=zip_form)
    assert list(TorchFile(path).tensors) == ["w"]


@both_forms
@pytest.mark.parametrize(
    ("value", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "torch.nn.modules.linear.Linear"),
        (lambda: {"c": torch.ones(2, dtype=torch.complex64)}, '"c" lies in a torch.ComplexFloatStorage'),
        (lambda: {"u": torch.ones(2, dtype=torch.uint16)}, "torch._utils._rebuild_tensor_v3"),
        (lambda: {"s": torch.eye(3).to_sparse()}, "torch._utils._rebuild_sparse_tensor"),
        (lambda: {"state_dict": {"w": torch.ones(2)}, "step": 1}, 'the entry "state_dict" is a dict'),
        (lambda: {"b": torch.ones(1).expand(4)}, '"b" of shape .4,. does not fit its storage of 1 values'),
        (lambda: torch.ones(2), "holds a tensor; expected a state dict"),
        (lambda: [torch.ones(2)], "holds a list; expected a state dict"),
        (lambda: {0: torch.ones(2)}, "the entry 0 is a tensor"),
    ],
)
def test_other_contents_are_refused(tmp_path: Path, value, message: str, zip_form: bool) -> None:
    path = tmp_path / "x.bin"
    torch.save(value(), path, _use_new_zipfile_serialization=zip_form)
    with pytest.raises(CheckpointError, match=message) as caught:
        TorchFile(path)
    assert str(path) in str(caught.value) and str(caught.value).count("\n") <= 1


def test_a_compiled_program_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "script.pt"
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), path)
    with pytest.raises(CheckpointError, match=r"script\.pt: holds __torch__\..*nothing was run"):
        TorchFile(path)
