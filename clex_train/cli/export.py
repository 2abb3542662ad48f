"""Write a trained model for other programs.

    python -m clex_train.cli.export run=runs/mine format=huggingface t=4 output=exports/mine_t4
    python -m clex_train.cli.export run=runs/mine format=huggingface length=65536 output=exports/mine_64k
    python -m clex_train.cli.export model=path/to/final format=vllm 't=[4,16]' log_scale=off output=exports/mine
    python -m clex_train.cli.export run=runs/mine format=gguf t=4 output=exports/mine_gguf
    python -m clex_train.cli.export run=runs/mine format=gguf t=4 base_gguf=plain_q4.gguf output=exports/mine_q4
    python -m clex_train.cli.export run=runs/llama2_7b_clex format=official output=exports/llama2_7b_clex

`huggingface` is the model at one t, for plain transformers; `vllm` the same with overrides for several t and the
command line; `sglang` the same for the families that SGLang scales; `gguf` a file for llama.cpp, of the model or of
the tensors of another GGUF file; `official` the layout of the original CLEX code (DAMO-NLP-SG/CLEX). Needs no GPU.
`--help` lists every key.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    # Before the imports that take seconds.
    from clex_train.resilience import stop_requests

    stop_requests.end_on_signals()

from clex_train.cli.export_arguments import (
    ExportConfig,
    Format,
    Scaling,
    Weights,
    folds,
    measured,
    records,
    scale_factors,
    source_directory,
)
from clex_train.config.model import ModelConfig
from clex_train.config.scaling import LogScale
from clex_train.console import arguments, program
from clex_train.export import constant_scale, huggingface, record, serving
from clex_train.export.factors import FixedRope, Source, rope_at
from clex_train.export.official import require_known, write_official
from clex_train.export.stock_rope import head_dim, require_no_temperature
from clex_train.gguf import files as gguf_files
from clex_train.gguf import patch, writer
from clex_train.models import directory, load
from clex_train.utils import log
from clex_train.utils.errors import require
from clex_train.utils.files import atomic_directory, make_folder

MODEL = "model.gguf"
"""File of an export for llama.cpp."""


def main() -> None:
    """Export the model of the command line; refuse unusable input before weights are read."""
    args = arguments.parse(ExportConfig, sys.argv[1:])
    source = source_directory(args)
    output = Path(args.output)
    # One writer a format; each checks, says what is ahead, and writes.
    writers: dict[Format, Callable[[ExportConfig, Path, Path], None]] = {
        Format.huggingface: _huggingface,
        Format.vllm: _vllm,
        Format.sglang: _sglang,
        Format.gguf: _gguf,
        Format.official: _official,
    }
    with arguments.named_as_typed(args):
        writers[args.format](args, source, output)


def usage() -> str:
    """Return the text of `--help`: the module's docstring and a paragraph for every key."""
    return arguments.usage(__doc__, ExportConfig)


def _huggingface(args: ExportConfig, directory: Path, output: Path) -> None:
    source = records(args, directory)
    (t,) = scale_factors(args, source)
    planned = _plan(args, source, directory, t)
    _announce(args, directory, output)
    huggingface.write(planned, output, measured(args))
    print(f"written to {output}: t = {t:g}, up to {planned.rope.served_len:,} tokens")
    print(serving.sglang_line(source.arch.model_type))


def _sglang(args: ExportConfig, directory: Path, output: Path) -> None:
    source = records(args, directory)
    serving.require_sglang(source.arch.model_type)
    _huggingface(args, directory, output)


def _vllm(args: ExportConfig, directory: Path, output: Path) -> None:
    source = records(args, directory)
    factors = scale_factors(args, source, many=True)
    ropes: list[FixedRope] = [rope_at(source, t) for t in factors]
    serving.require_vllm(ropes[0], source.arch)
    # First: it refuses log-scaling that no constant replaces, whatever the number of t.
    planned = _plan(args, source, directory, factors[-1])
    require(
        len(factors) == 1 or not folds(args, source),
        "t",
        args.t,
        f"one set of weights, and log_scale={source.log_scale.name} of the run is another constant in them for each t; "
        "use log_scale=off, or one t",
    )
    _announce(args, directory, output)
    huggingface.write(planned, output, measured(args), ropes)
    print(f"written to {output}\n\n{serving.length_table(source, ropes)}\n")
    print("\n".join(serving.vllm_command(output, rope) for rope in ropes))
    print(f"\n{serving.sglang_line(source.arch.model_type)}")


def _gguf(args: ExportConfig, directory: Path, output: Path) -> None:
    source = records(args, directory)
    (t,) = scale_factors(args, source)
    rope = rope_at(source, t)
    policy = source.log_scale if folds(args, source) else LogScale.off
    length = args.length or source.longest_at(t)
    layers = constant_scale.layers(source, length, policy)
    scale = constant_scale.of_all(source, layers)
    require_no_temperature(source.arch, rope)
    content = record.facts(source, directory, rope, policy, scale, length) | {"base_gguf": args.base_gguf}
    if args.base_gguf is None:
        file = _written_gguf(args, directory, rope, scale)
    else:
        # Its weights stay as they are: cos and sin, of queries and of keys, have the constant.
        magnitude = rope.attention_factor * _magnitude(source, rope, layers)
        file = patch.plan_added_factors(
            Path(args.base_gguf),
            rope.factors,
            rope.served_len,
            rope_theta=rope.rope_theta,
            attention_factor=magnitude,
            config=source.arch,
            directory=directory,
        )
    gguf_files.require_space(output, file)
    _announce(args, directory, output)
    make_folder(output.parent)
    with atomic_directory(output) as folder:
        gguf_files.write(folder / MODEL, file)
        record.write(folder, content, rope, measured(args), "llama.cpp")
    print(f"written to {output / MODEL}: t = {t:g}, up to {rope.served_len:,} tokens")


def _written_gguf(args: ExportConfig, directory: Path, rope: FixedRope, scale: float) -> gguf_files.Content:
    return writer.plan_gguf(
        directory,
        rope.factors,
        rope.served_len,
        weight_type=args.weight_type,
        query_scale=scale,
        attention_factor=rope.attention_factor,
        name=Path(str(args.output)).name,
    )


def _magnitude(source: Source, rope: FixedRope, layers: list[constant_scale.Layer]) -> float:
    return constant_scale.as_magnitude(source, layers, rope.rotary_dim, head_dim(source.arch.get_text_config()))


def _official(args: ExportConfig, directory: Path, output: Path) -> None:
    policy = _official_policy(args, directory)
    _announce(args, directory, output)
    loaded = load.load_for_evaluation(ModelConfig(path=str(directory)), dtype="auto")
    write_official(output, loaded, policy)
    print(f"written to {output}")


def _official_policy(args: ExportConfig, source: Path) -> LogScale | None:
    """Return the policy of the official layout; refuse one that it does not know, requested or of the run."""
    if args.log_scale is not None:
        require(args.log_scale is not Scaling.folded, "log_scale", "folded", "the official layout knows policies only")
        policy = LogScale(args.log_scale.value)
        require_known(policy)
        return policy
    if directory.has_clex(source):
        require_known(LogScale(directory.read_record(source).log_scale))
    return None


def _announce(args: ExportConfig, source: Path, output: Path) -> None:
    print(log.printable(f"export {source} as {args.format.value} to {output}"), file=sys.stderr, flush=True)


def _plan(args: ExportConfig, source: Source, directory: Path, t: float) -> huggingface.Plan:
    link = args.weights is not Weights.copy
    return huggingface.plan(source, directory, t, folds(args, source), link, args.trust_remote_code, args.length)


if __name__ == "__main__":
    log.setup()
    sys.exit(program.run(main, usage))
