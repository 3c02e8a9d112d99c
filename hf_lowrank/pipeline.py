"""compress(): walk the blocks of a model, decompose their linear layers, swap the results in."""

import copy
import logging
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from transformers import AutoTokenizer, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from .allocation import cheapest_choices, check_reachable, uniform_budgets
from .architectures import find_blocks, find_feed_forwards, find_layers
from .budget import Layer, ModelBudget
from .calibration import (
    BlockBatch,
    TokenBatch,
    block_statistics,
    calibration_batches,
    capture,
    fingerprint,
    noting_calls,
    output_grams,
    run_block,
    shifted_sums,
    squared_gradients,
    stage_sums,
    stages,
    starts_anew,
    stream_writers,
)
from .linears import dense_weight, permute_inputs, permute_outputs
from .locking import locked
from .methods import Decomposition, Method, Statistics, make_method
from .methods.base import Choice, ChoosingMethod
from .methods.soco import SoCo
from .methods.spectral import Measurement, SpectralMethod
from .progress import Step, progress_bar
from .report import LayerReport, Report, layer_report, sampled_spectrum
from .runtime.configuration import CompressionConfig, LayerSpec
from .runtime.errors import CompressionError, NumericalError
from .runtime.layers import CompressedLinear
from .runtime.quantizer import CompressionQuantizer, attach, swap_module
from .runtime.saving import CompleteSave
from .selection import TIED, left_out, select_layers, uncalled_layers
from .spectrum_training import learn_spectrum
from .version import __version__

SPECTRUM_STATE = "soco_state.safetensors"

logger = logging.getLogger(__name__)


def compress(
    model: PreTrainedModel,
    config: CompressionConfig | None = None,
    tokenizer: Any = None,
    calibration: Any = None,
    *,
    work_dir: str | Path | None = None,
    progress: bool = True,
) -> PreTrainedModel:
    """Compress the linear layers of a model's blocks, in place.

    Args:
        model: any dense transformers model with a list of blocks of `nn.Linear` or `Conv1D` layers.
        config: the recipe; by default SLaB at half of the stored bits.
        tokenizer: needed to calibrate on text; saved with the compressed model.
        calibration: what to calibrate on instead of `config.calibration`: "self", a dataset name, a text file, or an
            iterable of texts, token ids, chats or batches.
        work_dir: where SoCo keeps the state of its training, so that a killed run goes on from it.
        progress: whether to show a progress bar on a terminal.

    Returns:
        The same model, of its own class, with compressed layers; its `save_pretrained` writes a complete checkpoint.

    Raises:
        CompressionError: for a recipe that cannot be followed, before any work is done.
        NumericalError: if a weight, a calibration input or a result is not finite, naming the layer.
    """
    config = config or CompressionConfig()
    if any(isinstance(module, CompressedLinear) for module in model.modules()):
        raise CompressionError(f"{type(model).__name__} is compressed already; compress the dense model, or model.dequantize() this one")
    with progress_bar(progress) as step, torch.no_grad():
        was_training = model.training
        model.eval()
        try:
            run = _Compression(model, config, tokenizer, calibration, Path(work_dir) if work_dir else None, step)
            run.run()
        finally:
            model.train(was_training)
        run.finish()
    return model


def compress_on_load(model: PreTrainedModel, config: CompressionConfig) -> None:
    """What `from_pretrained(dense, quantization_config=config)` does after loading.

    Text named in `config.calibration` needs the tokenizer beside the model; without one the model calibrates on itself.
    """
    tokenizer = None
    if config.calibration == "self":
        logger.warning("compressing on load: calibrating on text sampled from the model itself; name a text in calibration= to use that")
        compress(model, config)
        return
    try:
        tokenizer = AutoTokenizer.from_pretrained(model.config._name_or_path)
    except (OSError, ValueError) as error:
        logger.warning("compressing on load: no tokenizer beside the model (%s); calibrating on text sampled from the model itself", error)
    compress(model, config, tokenizer, calibration=None if tokenizer else "self")


class _Compression:
    """One run of `compress`."""

    def __init__(
        self, model: PreTrainedModel, config: CompressionConfig, tokenizer: Any, calibration: Any, work_dir: Path | None, step: Step
    ) -> None:
        self.model, self.config, self.tokenizer, self.work_dir, self.step = model, config, tokenizer, work_dir, step
        self.method: Method = make_method(config.method, config.options)
        self.blocks = find_blocks(model)
        layers = find_layers(self.blocks)
        self.compressed, self.reasons = select_layers(model, layers, self.method, config)
        self.dense = [layer for layer in layers if layer.name in self.reasons]
        self.budget = model_budget(model, layers, config)
        self.available = check_reachable(self.method, self.compressed, self.dense, self.budget)
        self.warnings = left_out(model, self.blocks)
        check_finite(model)
        self.calibration = _described(config.calibration if calibration is None else calibration)
        self.tokens: list[TokenBatch] = calibration_batches(model, config, tokenizer, calibration)
        if self.method.needs_gradients or self.method.needs_output_gram or isinstance(self.method, SoCo):
            check_predicts_next_token(model, self.method.name, self.tokens)
        self.reports: list[LayerReport] = []
        self.curve: dict[str, list[float]] | None = None
        self.gradients: dict[str, Tensor] = {}
        self.output_grams: dict[str, Tensor] = {}

    def run(self) -> None:
        self.step("capturing block inputs", 0, len(self.compressed))
        with noting_calls({layer.name: self.model.get_submodule(layer.name) for layer in self.compressed}) as called:
            batches = capture(self.model, self.blocks, self.tokens)
        self.leave_uncalled_dense(called)
        if self.method.needs_gradients:
            self.step("measuring gradients", 0, len(self.compressed))
            self.gradients = squared_gradients(self.model, [layer.name for layer in self.compressed], self.tokens)
        if self.method.needs_output_gram:
            self.step("measuring curvature", 0, len(self.compressed))
            self.output_grams = output_grams(self.model, [layer.name for layer in self.compressed], self.tokens, self.config.seed)
        if isinstance(self.method, ChoosingMethod):
            self.choose_then_build(self.method, batches)
        elif isinstance(self.method, SpectralMethod):
            self.measure_then_decide(self.method, batches)
        else:
            self.layer_by_layer(batches)

    def leave_uncalled_dense(self, called: set[str]) -> None:
        """Layers that calibration never calls stay as they are.

        Raises:
            CompressionError: if the others cannot make up for them.
        """
        left = uncalled_layers(self.blocks, self.compressed, called)
        if left:
            self.reasons |= left
            self.dense += [layer for layer in self.compressed if layer.name in left]
            self.compressed = [layer for layer in self.compressed if layer.name not in left]
            name, reason = next(iter(left.items()))
            self.warnings.append(f"{len(left)} layers stay dense, such as {name}: {reason}")
            self.available = check_reachable(self.method, self.compressed, self.dense, self.budget)

    def layer_by_layer(self, batches: list[BlockBatch]) -> None:
        """Budgets first, then block by block."""
        budgets = uniform_budgets(self.method, self.compressed, self.dense, self.budget)
        for index, block, layers in self.walk():
            statistics = self.gather(index, block, layers, batches)
            for layer in layers:
                weight = self.weight(layer)
                decomposition = self.method.decompose(weight, statistics[layer.name], budgets[layer.name])
                self.swap(layer, decomposition, weight, statistics[layer.name])
            for batch in batches:
                if self.method.sequential:
                    batch.hidden = run_block(block, index, batch)
                elif batch.shifted is not None:
                    batch.shifted.hidden = run_block(block, index, batch.shifted)

    def measure_then_decide(self, method: SpectralMethod, batches: list[BlockBatch]) -> None:
        """Spectra of all layers in the dense model first, then ranks, then the layers."""
        measurements: dict[str, Measurement] = {}
        statistics: dict[str, Statistics] = {}
        for index, block, layers in self.walk():
            statistics |= self.gather(index, block, layers, batches)
            measurements |= {layer.name: method.measure(layer, self.weight(layer), statistics[layer.name]) for layer in layers}
        spectra = {name: sampled_spectrum(measurement.factorization.sigma) for name, measurement in measurements.items()}
        if isinstance(method, SoCo):
            measurements, ranks = self.learn(method, measurements)
        else:
            ranks = method.allocate(measurements, self.budget, self.available)
        for layer in self.compressed:
            rank = ranks[layer.name]
            if rank is None:
                self.reasons[layer.name] = f"{method.name} gives it a rank that would cost as much as the dense layer"
            else:
                made = measurements[layer.name].finish(rank)
                self.swap(layer, made, self.weight(layer), statistics[layer.name], spectra[layer.name])

    def choose_then_build(self, method: ChoosingMethod, batches: list[BlockBatch]) -> None:
        """What each layer could become, measured in the dense model; one budget for all; then stage by stage, each on corrected targets."""
        inputs = [batch.hidden for batch in batches]
        choices: dict[str, list[Choice]] = {}
        statistics: dict[str, Statistics] = {}
        for index, block, layers in self.walk():
            statistics |= self.gather(index, block, layers, batches)
            for layer in layers:
                choices[layer.name] = method.choices(layer, self.weight(layer), statistics[layer.name], self.budget.value_bits[layer.name])
        chosen = self.choose(choices)
        for batch, hidden in zip(batches, inputs, strict=True):
            batch.hidden, batch.shifted = hidden, BlockBatch(hidden, batch.calls)
        for index, block, layers in self.walk():
            if starts_anew(batches, index):
                self.start_list(index, batches)
            dense, block_name = copy.deepcopy(block), list(self.blocks)[index]
            local = {layer.name.removeprefix(f"{block_name}."): layer for layer in layers}
            writers = self.stream_writers(block, index, layers, batches[0])
            order = stages(block, index, batches[0], {name: block.get_submodule(name) for name in local})
            for names in order:
                writer = None
                if names[0] in writers:
                    writer = (
                        "output" if names[0] == max(writers, key=lambda name: [name in stage for stage in order].index(True)) else "input"
                    )
                sums = stage_sums(dense, block, index, batches, names, writer)
                for name in names:
                    layer = local[name]
                    spec, weight, known = chosen[layer.name], self.weight(layer), statistics[layer.name]
                    if spec is None:
                        self.reasons[layer.name] = f"{method.name} finds that its bytes are best spent on the dense layer"
                        continue
                    target = weight if sums is None else sums.target(weight)
                    fitted = known if sums is None else sums.statistics(known)
                    self.swap(layer, method.build(target, fitted, spec), weight, known)
            for batch in batches:
                assert batch.shifted is not None
                batch.shifted.hidden = run_block(block, index, batch.shifted)
                batch.hidden = run_block(dense, index, batch)

    def choose(self, choices: dict[str, list[Choice]]) -> dict[str, LayerSpec | None]:
        """One choice per layer within the budget; None for a layer that stays dense."""
        layers = {layer.name: layer for layer in self.compressed}
        options = {
            name: [(self.budget.stored_bits(layers[name], choice.spec), choice.loss) for choice in each]
            + [(self.budget.dense_bits(layers[name]) - self.budget.bias_bits[name], 0.0)]
            for name, each in choices.items()
        }
        taken = cheapest_choices(options, self.available)
        return {name: each[taken[name]].spec if taken[name] < len(each) else None for name, each in choices.items()}

    def stream_writers(self, block: nn.Module, index: int, layers: list[Layer], batch: BlockBatch) -> list[str]:
        """The two layers of a block that write to the residual stream, named within it; none if the block is not made that way."""
        block_name = list(self.blocks)[index]
        found = {layer.role: layer.name.removeprefix(f"{block_name}.") for layer in layers if layer.role in ("output", "ffn_out")}
        count = sum(layer.role in ("output", "ffn_out") for layer in layers)
        if len(found) != 2 or count != 2 or not stream_writers(block, index, batch, {n: block.get_submodule(n) for n in found.values()}):
            return []
        return list(found.values())

    def learn(self, method: SoCo, measurements: dict[str, Measurement]) -> tuple[dict[str, Measurement], dict[str, int | None]]:
        """SoCo's training; its state lives in the work folder until it is done, and no other process may use that meanwhile."""
        state: Path | None = None
        hold: AbstractContextManager[None] = nullcontext()
        if self.work_dir is not None:
            self.work_dir.mkdir(parents=True, exist_ok=True)
            state, hold = self.work_dir / SPECTRUM_STATE, locked(self.work_dir)
        with hold:
            learned, ranks, curve = learn_spectrum(
                self.model, method, measurements, self.tokens, self.budget, self.available, self.config.seed, state,
                lambda done, total: self.step("learning the spectrum", done, total),
            )  # fmt: skip
            if state is not None:
                state.unlink(missing_ok=True)
        self.curve = curve.__dict__
        return learned, ranks

    def walk(self) -> Any:
        """(index, block, its layers to compress) for every block."""
        done = 0
        for index, (name, block) in enumerate(self.blocks.items()):
            layers = [layer for layer in self.compressed if layer.block == index]
            self.step(name, done, len(self.compressed))
            yield index, block, layers
            done += len(layers)

    def gather(self, index: int, block: nn.Module, layers: list[Layer], batches: list[BlockBatch]) -> dict[str, Statistics]:
        """Statistics of the block's layers; the batches move on to its dense outputs, unless the method is sequential."""
        if starts_anew(batches, index):
            self.start_list(index, batches)
        modules = {layer.name: self.model.get_submodule(layer.name) for layer in layers}
        shifted = shifted_sums(block, index, batches, modules) if self.method.needs_shifted else None
        found, outputs = block_statistics(block, index, batches, modules, self.method.needs_gram)
        if not self.method.sequential:
            for batch, output in zip(batches, outputs, strict=True):
                if self.method.needs_shifted and batch.shifted is None:
                    batch.shifted = BlockBatch(batch.hidden, batch.calls)
                batch.hidden = output
        statistics = {}
        for layer in layers:
            known = found[layer.name]
            if known is None:
                self.warnings.append(f"{layer.name} saw no calibration token; it is compressed without data")
            statistics[layer.name] = known or _no_data(layer, modules[layer.name])
            if shifted is not None and known is not None:
                statistics[layer.name] = shifted.extend(layer.name, known)
            if layer.name in self.gradients:
                statistics[layer.name] = replace(statistics[layer.name], squared_gradients=self.gradients[layer.name])
            if layer.name in self.output_grams:
                statistics[layer.name] = replace(statistics[layer.name], output_gram=self.output_grams[layer.name])
        self.order_neurons(index, block, statistics)
        return statistics

    def start_list(self, index: int, batches: list[BlockBatch]) -> None:
        """Take up the inputs of a block that does not go on from the one before it, from the model as it is by now where that is asked for.

        A decoder also reads the encoder's states: those of the compressed encoder, if the method is sequential.
        """
        follows = self.method.sequential or any(batch.shifted is not None for batch in batches)
        now = capture(self.model, self.blocks, self.tokens) if follows else batches
        for position, batch in enumerate(batches):
            if self.method.sequential:
                batches[position] = now[position]
                batches[position].hidden = batch.hidden
            elif batch.shifted is not None:
                now[position].hidden = batch.shifted.hidden
                batch.shifted = now[position]
                batch.shifted.enter(index)
            batches[position].enter(index)

    def order_neurons(self, index: int, block: nn.Module, statistics: dict[str, Statistics]) -> None:
        """Permute the neurons of the block's feed-forward networks as the method wants; the function of the block is unchanged."""
        block_name = list(self.blocks)[index]
        for network in find_feed_forwards(block):
            output_name = f"{block_name}.{network.output}"
            names = [f"{block_name}.{name}" for name in network.inputs]
            if output_name not in statistics or any(self.reasons.get(name) == TIED for name in names):
                continue
            output = block.get_submodule(network.output)
            order = self.method.neuron_order(statistics[output_name], dense_weight(output))
            if order is None:
                continue
            for name in network.inputs:
                permute_outputs(block.get_submodule(name), torch.cat([order, order + len(order)]) if network.fused else order)
            permute_inputs(output, order)
            statistics[output_name] = statistics[output_name].select(order)

    def weight(self, layer: Layer) -> Tensor:
        """The dense weight, (m, n) float64."""
        return dense_weight(self.model.get_submodule(layer.name)).double()

    def swap(
        self, layer: Layer, decomposition: Decomposition, weight: Tensor, statistics: Statistics, spectrum: list[float] | None = None
    ) -> None:
        """Put the compressed layer in place and report on it.

        Raises:
            NumericalError: if a stored value is not finite.
        """
        self.step(layer.name, len(self.reports), len(self.compressed))
        dense = self.model.get_submodule(layer.name)
        assert isinstance(dense.weight, Tensor)
        bias = dense.bias if isinstance(dense.bias, Tensor) else None
        made = decomposition.to_layer(layer.out_features, layer.in_features, bias, dense.weight.dtype)
        made.replaces_conv1d = isinstance(dense, Conv1D)
        for name, parameter in made.named_parameters():
            if not bool(parameter.isfinite().all()):
                raise NumericalError(
                    f"{layer.name}: {self.method.name} gave a {name} that is not finite in {parameter.dtype}; use a wider dtype"
                )
        made.requires_grad_(dense.weight.requires_grad)
        swap_module(self.model, layer.name, made.train(dense.training))
        self.reports.append(layer_report(layer.name, made, weight, statistics, self.budget.dense_bits(layer), spectrum))

    def finish(self) -> None:
        """Make the model a compressed one for transformers, with its config and report."""
        config = self.config
        specs: dict[str, LayerSpec] = {
            name: module.spec for name, module in self.model.named_modules() if isinstance(module, CompressedLinear)
        }
        provenance = {
            "base_model": getattr(self.model.config, "_name_or_path", ""),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "calibration_sha256": fingerprint(self.tokens),
            "calibration_tokens": sum(batch.tokens for batch in self.tokens),
            "versions": {"hf_lowrank": __version__, "torch": torch.__version__, "transformers": transformers.__version__},
        }
        options = {name: getattr(self.method, name) for name in self.method.__dict__}
        final = CompressionConfig.from_dict(
            {**config.to_dict(), "calibration": self.calibration, "options": options, "provenance": provenance, "layers": {}}
        )
        final.layers = specs
        attach(self.model, CompressionQuantizer(final, pre_quantized=True))
        save = CompleteSave.attach(self.model)
        save.tokenizer = self.tokenizer
        report = self.report()
        save.report = report.to_dict()
        for name, reason in self.reasons.items():
            logger.info("%s stays dense: %s", name, reason)
        for warning in report.warnings:
            logger.warning(warning)

    def report(self) -> Report:
        layers = self.compressed + self.dense
        total = sum(self.budget.dense_bits(layer) for layer in layers)
        stored = {report.name: report.stored_bits for report in self.reports}
        bits = sum(stored.get(layer.name, self.budget.dense_bits(layer)) for layer in layers)
        masks = bits - sum(
            module.stored_bits("paper") if isinstance(module, CompressedLinear) else self.budget.dense_bits(layer)
            for layer in layers
            for module in [self.model.get_submodule(layer.name)]
        )
        return Report(
            method=self.method.name,
            ratio_asked=self.config.ratio,
            ratio_stored=1 - bits / total,
            ratio_paper=1 - (bits - masks) / total,
            accounting=self.config.accounting,
            layers=self.reports,
            dense=self.reasons,
            warnings=self.warnings,
            curve=self.curve,
        )


def model_budget(model: PreTrainedModel, layers: list[Layer], config: CompressionConfig) -> ModelBudget:
    """The budget of a model at the config's ratio; values count in the dtype that each layer has now."""
    value_bits, bias_bits = {}, {}
    for layer in layers:
        module = model.get_submodule(layer.name)
        value_bits[layer.name] = dense_weight(module).dtype.itemsize * 8
        bias_bits[layer.name] = module.bias.numel() * module.bias.itemsize * 8 if isinstance(module.bias, Tensor) else 0
    return ModelBudget(config.ratio, value_bits, bias_bits, config.accounting)


def check_predicts_next_token(model: PreTrainedModel, method: str, batches: list[TokenBatch]) -> None:
    """Raise CompressionError if the loss that a method learns from, that of the next token of a text, is not what the model is for."""
    if not model.can_generate() or model.config.is_encoder_decoder or any(batch.others for batch in batches):
        raise CompressionError(
            f"{method} learns from the loss of the next token of a text, which is not what {type(model).__name__} is given; "
            "use a method without training, such as slab or sola"
        )


def check_finite(model: PreTrainedModel) -> None:
    """Raise NumericalError if a weight is not finite, naming it: what it makes of the calibration would blame other layers."""
    for name, parameter in model.named_parameters():
        if not bool(parameter.isfinite().all()):
            raise NumericalError(f"{name}: the weight is not finite; the checkpoint is damaged or its dtype too narrow")


def _described(calibration: Any) -> str:
    return calibration if isinstance(calibration, str) else f"given by the caller ({type(calibration).__name__})"


def _no_data(layer: Layer, module: nn.Module) -> Statistics:
    n, device = layer.in_features, dense_weight(module).device
    ones = torch.ones(n, dtype=torch.float64, device=device)
    return Statistics(tokens=0, column_norms=ones, mean=torch.zeros_like(ones), mean_abs=ones, gram=torch.diag(ones))
