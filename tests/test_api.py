"""apply_clex with every kind of source, and refusals that leave the model untouched."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from clex_train.api import apply_clex
from clex_train.config.scaling import LogScale
from clex_train.models.directory import write_clex
from clex_train.rope.patch import install_rotary
from clex_train.rope.rotary import ScaledRotary
from clex_train.scaling.clex import Clex
from clex_train.scaling.frequency_table import FrequencyTable, scale_grid
from clex_train.scaling.methods.ntk import ntk_table
from clex_train.utils.files import atomic_directory
from tests.helpers.tiny_causal_lm import CONTEXT, VOCABULARY, tiny_llama

BASE = install_rotary(tiny_llama(), CONTEXT).base_inv_freq


@pytest.fixture(autouse=True, scope="module")
def _single_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trained_field(base: torch.Tensor = BASE) -> Clex:
    clex = Clex(base, t_max=4.0)
    torch.nn.init.normal_(clex.down, std=0.3, generator=torch.Generator().manual_seed(1))
    return clex


def run_directory(folder: Path, log_scale: LogScale = LogScale.off, base: torch.Tensor = BASE) -> Path:
    field = trained_field(base)
    folder.mkdir(parents=True)
    write_clex(folder, field, field.table(scale_grid(4.0)), CONTEXT, log_scale)
    return folder


def tokens(num_tokens: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (1, num_tokens), generator=torch.Generator().manual_seed(2))


@torch.no_grad()
def test_a_run_a_field_and_its_table_give_the_same_logits(tmp_path: Path) -> None:
    model, ids, found = tiny_llama(), tokens(50), []
    field = trained_field()
    for source in (run_directory(tmp_path / "final"), field, field.table(scale_grid(4.0))):
        clex = apply_clex(model, source)
        assert clex.handle.context_len == CONTEXT
        found.append(model(ids).logits)
        clex.undo()
    assert torch.allclose(found[0], found[1], atol=1e-5, rtol=0)
    assert torch.equal(found[1], found[2])
    assert not torch.allclose(found[0], model(ids).logits, atol=1e-2)


@torch.no_grad()
def test_apply_clex_without_a_source_is_ntk_scaling() -> None:
    model, ids = tiny_llama(), tokens(50)
    clex = apply_clex(model, t_max=4)
    found = model(ids).logits
    clex.undo()
    with_table = apply_clex(model, ntk_table(BASE, scale_grid(4.0)))
    assert torch.allclose(found, model(ids).logits, atol=1e-5, rtol=0)
    with_table.undo()


@torch.no_grad()
def test_undo_restores_logits_and_modules_bitwise() -> None:
    model, ids = tiny_llama(), tokens(40)
    before, modules = model(ids).logits, dict(model.named_modules())
    clex = apply_clex(model, trained_field(), log_scale="always")
    assert not torch.equal(model(ids).logits, before)
    clex.undo()
    assert torch.equal(model(ids).logits, before)
    assert dict(model.named_modules()) == modules


@torch.no_grad()
def test_log_scaling_follows_the_source_unless_overridden(tmp_path: Path) -> None:
    model, folder = tiny_llama(), run_directory(tmp_path / "final", LogScale.always)
    for asked, policy in ((None, "always"), ("off", "off"), ("token_eval", "token_eval")):
        clex = apply_clex(model, folder, log_scale=asked)
        assert clex.log_scaling.policy == policy
        clex.undo()


@torch.no_grad()
def test_t_is_pinned_per_generate_call_and_moves_again_after_it() -> None:
    model, seen = tiny_llama(), []
    clex = apply_clex(model, trained_field())
    model.model.register_forward_hook(lambda *_: seen.append(clex.handle.rotary.spectrum.t))
    with clex.pinned(3):
        model.generate(tokens(14), max_new_tokens=4, do_sample=False)
    model.generate(tokens(14), max_new_tokens=4, do_sample=False)
    assert seen == [3.0] * 4 + [1.0, 1.0, 1.0, 2.0]


def test_clamping_is_opt_in(caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_llama()
    clex = apply_clex(model, trained_field())
    with pytest.raises(ValueError, match=r"num_tokens=65: beyond t_max \* L = 4 \* 16"):
        model(tokens(65))
    clex.undo()
    apply_clex(model, trained_field(), clamp=True)
    model(tokens(65))
    assert "num_tokens=65 exceeds t_max" in caplog.text


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda folder: run_directory(folder, base=BASE / 2),
            r"final: starts from theta\[\d\]=\S+, but the model's is \S+;",
        ),
        (lambda folder: run_directory(folder, base=BASE[:5]), "final: rotary dimension 10, but the model's is 12"),
        (lambda folder: Clex(BASE[:5], 4.0), "the field: rotary dimension 10, but the model's is 12"),
        (lambda folder: FrequencyTable(torch.ones(1).double(), torch.ones(1, 5).double()), "rotary dimension 10"),
        (lambda folder: folder, "contains no CLEX"),
    ],
)
def test_unusable_sources_are_refused_with_the_model_untouched(tmp_path: Path, make, message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=message) as refusal:
        apply_clex(model, make(tmp_path / "final"))
    assert "\n" not in str(refusal.value)
    assert not any(isinstance(module, ScaledRotary) for module in model.modules())
    assert not model.model._forward_pre_hooks


def spoil(folder: Path, name: str, value: torch.Tensor) -> None:
    path = folder / "clex.safetensors"
    save_file({**load_file(path), name: value}, path)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("up", torch.full((6, 12), float("nan")), "clex.safetensors: `up` has weights that are not finite"),
        ("up", torch.zeros(5, 12), "clex.safetensors: not the field that clex.json describes .*5 x 12"),
        ("base_inv_freq", torch.zeros(6).double(), "clex.safetensors: .*finite, positive frequencies"),
    ],
)
def test_a_damaged_field_is_named_by_its_file(tmp_path: Path, name: str, value: torch.Tensor, message: str) -> None:
    folder = run_directory(tmp_path / "final")
    spoil(folder, name, value)
    with pytest.raises(ValueError, match=message) as refusal:
        apply_clex(tiny_llama(), folder)
    assert "\n" not in str(refusal.value)


def test_a_file_that_is_not_safetensors_is_named(tmp_path: Path) -> None:
    folder = run_directory(tmp_path / "final")
    (folder / "clex.safetensors").write_bytes(b"half a file")
    with pytest.raises(ValueError, match=r"clex\.safetensors: not the field"):
        apply_clex(tiny_llama(), folder)


def test_a_field_with_non_finite_weights_leaves_the_model_untouched() -> None:
    model, field = tiny_llama(), trained_field()
    with torch.no_grad():
        field.up[2, 3] = float("nan")
    with pytest.raises(ValueError, match=r"CLEX weight up\[2, 3\]=nan: not finite"):
        apply_clex(model, field)
    assert not any(isinstance(module, ScaledRotary) for module in model.modules())


def test_an_error_while_writing_keeps_the_earlier_directory(tmp_path: Path) -> None:
    final = run_directory(tmp_path / "final")

    def fail_halfway() -> None:
        with atomic_directory(final) as folder:
            (folder / "half").write_text("x")
            raise RuntimeError("disk")

    with pytest.raises(RuntimeError, match="disk"):
        fail_halfway()
    assert (final / "clex.json").exists()
    assert not (final / "half").exists()
