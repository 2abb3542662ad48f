"""Build the parts of a training run from what the checks built: model, engine, optimizer of the ODE, evaluations."""

from pathlib import Path

from clex_train.adapters import frozen_weights, lora
from clex_train.config import duration
from clex_train.config.root import Config
from clex_train.engine import deepspeed as engines
from clex_train.engine import sequence_parallel
from clex_train.model_config import size
from clex_train.models import load, memory_options
from clex_train.preflight import kernels
from clex_train.preflight.run_checks import Preflight
from clex_train.resilience import stop_requests
from clex_train.resilience.deadline import Deadline
from clex_train.resilience.loss_spikes import NoSpikeWatch, SpikeWatch
from clex_train.resilience.stop_requests import StopRequests
from clex_train.tracking import metrics
from clex_train.training.ode_optimizer import FixedFrequencies, OdeOptimizer
from clex_train.training.run_setup import STOP_FILE
from clex_train.training.state import Parts
from clex_train.utils import distributed


def listen_for_stops(config: Config) -> StopRequests:
    """Create the sources of stop requests: signals, the stop file, the deadline of `max_runtime`."""
    return StopRequests(
        stop_requests.signals(),
        Path(config.output_dir) / STOP_FILE if distributed.is_main() else None,
        Deadline(duration.seconds("max_runtime", config.max_runtime)) if config.max_runtime else None,
    )


def build(ready: Preflight, stop: StopRequests) -> Parts:
    """Choose the checkpoint to resume, load the weights and wrap them into an engine. Collective."""
    config, history, rows = ready.config, ready.history, ready.inputs.rows
    assert history is not None, "run_checks leaves it out of plans alone"
    assert rows is not None
    history.checkpoints.choose()
    loaded = _load(ready)
    ode = frequencies(config, loaded)
    engine = engines.build(loaded.model, config)
    stop.deadline.assume("save", metrics.assumed_save_seconds(size.num_trained(loaded.model)))
    if ready.evaluation:
        ready.evaluation.interrupted = lambda: stop.reason() is not None
    optim = config.optim
    return Parts(
        config=config,
        engine=engine,
        loaded=loaded,
        rows=rows,
        ode=ode,
        checkpoints=history.checkpoints,
        evaluate=ready.evaluation,
        flops_per_token=metrics.flops_per_token(*size.matmul_shape(loaded.model), config.data.seq_len),
        stop=stop,
        spikes=SpikeWatch(optim.spike_factor, optim.spike_window) if optim.spike_factor else NoSpikeWatch(),
        sequence=sequence_parallel.build(loaded.model, config, engine.train_micro_batch_size_per_gpu()),
        trained=ready.adapters,
        frozen=frozen_weights.digest(loaded.model) if ready.adapters else "",
    )


def frequencies(config: Config, loaded: load.LoadedModel) -> OdeOptimizer | FixedFrequencies:
    """Create the source of each step's frequencies: the optimizer of learned ones, or a formula's."""
    scaling = config.scaling
    if loaded.static is not None:
        factor = loaded.static.t_max
        return OdeOptimizer(loaded.static, scaling, config.seed, t_as_used=factor, fixed_t=factor)
    if loaded.clex is None:
        return FixedFrequencies(loaded.formula, scaling.as_used, config.seed)
    used = scaling.t_as_used(config.data.seq_len, loaded.context_len)
    return OdeOptimizer(loaded.clex, scaling, config.seed, t_as_used=used)


def _load(ready: Preflight) -> load.LoadedModel:
    """Load the model, and install its kernels and memory options."""
    config, dtype = ready.config, engines.precision(ready.config.engine)
    loaded = load.load_for_training(config, ready.arch, dtype, ready.settings, ready.trained)
    if ready.adapters:
        # Before the kernels and tiles below, which take the layers as they find them.
        lora.inject(loaded.model, ready.adapters, config.seed)
    kernels.announce(config, ready.arch, kernels.install(loaded.model, config))
    memory_options.install(loaded.model, config.engine)
    memory_options.announce(loaded.model, config.engine, distributed.device())
    return loaded
