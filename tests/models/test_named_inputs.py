"""A model reads what it is given under the names of its own `forward`, which may not be those of its parts."""

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_lowrank import CompressionConfig, CompressionError, compress
from hf_lowrank.calibration import TokenBatch, calibration_batches, capture, fingerprint
from hf_lowrank.models.architectures import find_blocks

from ..support.model_families import FAMILIES, Batches
from ..support.named_inputs import CODEBOOKS, READERS, ids
from ..support.whole_models import recipe


@pytest.fixture(params=READERS)
def key(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def make(key: str) -> PreTrainedModel:
    return READERS[key].make(key.partition(" ")[0])


def inputs_of_blocks(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """Return the hidden states that come into the blocks in the model's own forward, each list of them first."""
    seen: list[Tensor] = []

    def see(module: Any, args: Any, kwargs: Any) -> None:
        seen.append(args[0] if args else kwargs["hidden_states"])

    handles = [block.register_forward_pre_hook(see, with_kwargs=True) for block in find_blocks(model).values()]
    torch.manual_seed(0)  # SpeechT5 draws in its decoder, in evaluation, too
    with torch.no_grad():
        model(**batch)
    for handle in handles:
        handle.remove()
    return seen


def captured_inputs(model: PreTrainedModel, given: Any) -> list[Tensor]:
    """Return the hidden states with which lists of blocks start in a calibration."""
    batches = calibration_batches(model, CompressionConfig(samples=2, sequence_length=16), None, given)
    torch.manual_seed(0)
    captured = capture(model, find_blocks(model), batches)
    return [call.start.tensor for batch in captured for call in batch.calls if call and call.start is not None]


def is_among(tensor: Tensor, others: list[Tensor]) -> bool:
    return any(tensor.shape == other.shape and torch.equal(tensor, other) for other in others)


def test_the_blocks_see_what_they_see_in_the_models_own_forward(key: str) -> None:
    model, batch = make(key), READERS[key].batch
    own = inputs_of_blocks(model, batch)
    starts = captured_inputs(model, [batch])
    assert starts and all(is_among(start, own) for start in starts)


def test_it_is_compressed_in_every_layer_that_is_called(key: str) -> None:
    model, batch = make(key), READERS[key].batch
    compress(model, recipe("wanda", 0.3), calibration=[batch], progress=False)
    report = model.save_pretrained.report
    cross = ("encoder_attn",) if key == "MusicgenForCausalLM" else ()  # it is given no text
    assert report["layers"]
    assert all(any(part in name for part in cross) for name in report["dense"])
    with torch.no_grad():
        model(**batch)


@pytest.mark.parametrize(
    "key", [key for key, reader in READERS.items() if reader.decoder_input and "Musicgen" not in key]
)
def test_labels_are_what_the_decoder_reads_delayed(key: str) -> None:
    model, reader = make(key), READERS[key]
    assert reader.decoder_input is not None
    name, values = reader.decoder_input
    labels = torch.cat([values[:, 1:], values[:, -1:]], dim=1) if name == "decoder_input_ids" else values
    given = reader.inputs | {"labels": labels}
    own = inputs_of_blocks(model, given)
    starts = captured_inputs(model, [given])
    if key != "BlipForQuestionAnswering":  # it marks the start by another token
        assert all(is_among(start, own) for start in starts)
    # Beside the decoder's own input, labels only compute a loss.
    both = captured_inputs(model, [reader.batch | {"labels": labels}])
    for one, other in zip(both, captured_inputs(model, [reader.batch]), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("family", ["Llama", "BERT", "T5", "Whisper", "ViT", "LLaVA"])
def test_a_subclass_that_hands_all_arguments_on_reads_what_its_base_reads(family: str) -> None:
    model, batches = FAMILIES[family].make(), FAMILIES[family].batches()
    expected = captured_inputs(model, batches)

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return super(type(self), self).forward(*args, **kwargs)

    model.__class__ = type("Own", (type(model),), {"forward": forward})
    found = captured_inputs(model, batches)
    assert len(found) == len(expected) and all(map(torch.equal, found, expected))


def test_what_belongs_to_a_loss_is_left_out() -> None:
    model = FAMILIES["BERT"].make()
    rows = ids(3, 9).tolist()
    targets: Batches = [{"labels": [0] * 9, "start_positions": 1, "end_positions": 2, "next_sentence_label": 1}] * 3
    given = [{"input_ids": row, **target} for row, target in zip(rows, targets, strict=True)]
    (batch,) = calibration_batches(model, CompressionConfig(samples=3), None, given)
    assert batch.others == {} and torch.equal(batch.input_ids, ids(3, 9))


CODES = ids(2 * CODEBOOKS, 9, below=30)


@pytest.mark.parametrize(
    "given",
    [CODES, {"input_ids": CODES}, [CODES], [CODES.tolist()], [{"input_ids": CODES.view(2, CODEBOOKS, 9)}]],
    ids=["tensor", "mapping", "batch", "lists", "by sample"],
)
def test_the_codes_of_a_sample_stay_together(given: Any) -> None:
    model = make("MusicgenForCausalLM")
    (batch,) = calibration_batches(model, CompressionConfig(samples=2), None, given)
    assert torch.equal(batch.others["input_ids"].flatten(0, 1), CODES)
    assert batch.sequences == 2
    (first,) = calibration_batches(model, CompressionConfig(samples=1), None, given)
    assert torch.equal(first.others["input_ids"].flatten(0, 1), CODES[:CODEBOOKS])


UNREADABLE = {
    "too many dimensions": ("Llama", [{"input_ids": torch.ones(1, 1, 40).long()}], r"shape \(1, 1, 40\), which Llama"),
    "by a loader": ("Llama", [{"input_ids": torch.ones(3, 1, 40).long()}], r"expected \(tokens,\) or \(samples"),
    "a number": ("Llama", [{"input_ids": 5}], r"shape \(\)"),
    "a list of lists of lists": ("BERT", [{"input_ids": [[[5, 6]], [[5, 6]]]}], r"shape \(2, 1, 2\)"),
    "too few codes": ("MusicgenForCausalLM", [{"input_ids": CODES[:3]}], "codes of 4 codebooks together"),
    "a row of codes": ("MusicgenForCausalLM", [[5, 6, 7]], "codes of 4 codebooks together"),
    "text for codes": ("MusicgenForCausalLM", ["a text", "another"], "codes of 4 codebooks, not text"),
    "a chat for codes": ("MusicgenForCausalLM", [[{"role": "user", "content": "a"}]], "4 codebooks, not text"),
    "itself for codes": ("MusicgenForCausalLM", "self", "takes codes of sounds, which 'self' does not give"),
    "text for a decoder of codes": (
        "MusicgenForConditionalGeneration",
        ids(4, 9).tolist(),
        "give batches with decoder_input_ids or labels",
    ),
    "sound without text": (
        "SpeechEncoderDecoderModel",
        [READERS["SpeechEncoderDecoderModel"].inputs],
        "give batches with decoder_input_ids or labels",
    ),
    "pictures for speech": (
        "SpeechEncoderDecoderModel",
        [{"pixel_values": torch.ones(1, 3, 4, 4)}],
        "reads, such as inputs",
    ),
    "frames of another size": (
        "Speech2TextForConditionalGeneration",
        [{"input_features": torch.ones(2, 40, 5), "decoder_input_ids": ids(2, 9)}],
        r"Speech2TextForConditionalGeneration cannot read a batch of input_features \(2, 40, 5\), .* \(RuntimeError: ",
    ),
    "a missing input": (
        "BlipForQuestionAnswering",
        [READERS["BlipForQuestionAnswering"].inputs],
        "BlipForQuestionAnswering cannot read a batch of",
    ),
}


@pytest.mark.parametrize("case", UNREADABLE)
def test_what_a_model_cannot_read_is_one_line(case: str) -> None:
    name, given, message = UNREADABLE[case]
    model = FAMILIES[name].make() if name in FAMILIES else make(name)
    untouched = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    with pytest.raises(CompressionError, match=message) as raised:
        compress(model, recipe("magnitude", 0.3), calibration=given, progress=False)
    assert "\n" not in str(raised.value)
    assert all(torch.equal(tensor, untouched[key]) for key, tensor in model.state_dict().items())


def test_batches_of_codes_differ_by_their_codes() -> None:
    no_text = torch.empty(0, 0, dtype=torch.long)
    one, other = (TokenBatch(no_text, None, {"input_ids": codes}) for codes in (CODES, CODES + 1))
    assert fingerprint([one]) != fingerprint([other])
