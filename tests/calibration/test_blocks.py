"""Blocks are not computed in order to capture their arguments, unless these depend on what other blocks compute."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, T5Config, T5EncoderModel

from hf_lowrank.calibration import TokenBatch, capture, run_block, split_into_passes
from hf_lowrank.models.architectures import find_blocks

from ..support import tiny_models

IDS = tiny_models.token_ids(6, 20)


def computed_tokens(model: PreTrainedModel, batches: list[TokenBatch]) -> tuple[int, list[Tensor]]:
    """Capture the batches and run them through all blocks.

    Returns:
        The number of tokens that a linear layer of the last block saw in the capture, and the hidden states after the
        last block.
    """
    blocks = find_blocks(model)
    linear = next(module for module in list(blocks.values())[-1].modules() if isinstance(module, nn.Linear))
    seen: list[int] = []
    handle = linear.register_forward_pre_hook(
        lambda module, inputs: seen.append(inputs[0].numel() // inputs[0].shape[-1])
    )
    captured = capture(model, blocks, batches)
    handle.remove()
    for index, block in enumerate(blocks.values()):
        for batch in captured:
            with torch.no_grad():
                batch.hidden = run_block(block, index, batch)
    return sum(seen), [batch.hidden for batch in captured]


def dense_outputs(model: PreTrainedModel, batches: list[TokenBatch]) -> list[Tensor]:
    """Return the outputs of the last block in the model's own forward."""
    outputs: list[Tensor] = []
    last = list(find_blocks(model).values())[-1]
    handle = last.register_forward_hook(
        lambda module, inputs, output: outputs.append(output[0] if isinstance(output, tuple) else output)
    )
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch.input_ids, attention_mask=batch.attention_mask)
    handle.remove()
    return outputs


def test_blocks_are_computed_for_a_few_tokens_only() -> None:
    model, batches = tiny_models.llama().eval(), [TokenBatch(IDS), TokenBatch(IDS.flip(0))]
    tokens, outputs = computed_tokens(model, batches)
    assert 0 < tokens < IDS.shape[1]
    torch.testing.assert_close(outputs, dense_outputs(model, batches))
    assert all("forward" not in vars(block) for block in find_blocks(model).values())


def encoder() -> PreTrainedModel:
    """Return a model whose first block gives the others their position biases, beside its hidden states."""
    torch.manual_seed(0)
    return T5EncoderModel(
        T5Config(vocab_size=int(IDS.max()) + 1, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4)
    ).eval()


def chained() -> PreTrainedModel:
    """Return a model in which every block gets the mean of the output of the block before it, and adds it."""
    model = tiny_models.llama().eval()
    state: dict[str, Any] = {"mean": 0.0}
    for block in find_blocks(model).values():
        original = block.forward

        def forward(hidden: Tensor, *args: Any, mean: Any = 0.0, original: Any = original, **kwargs: Any) -> Tensor:
            output: Tensor = original(hidden, *args, **kwargs) + mean
            state["mean"] = output.mean()
            return output

        block.forward = forward
        block.register_forward_pre_hook(
            lambda module, args, kwargs: (args, {**kwargs, "mean": state["mean"]}), with_kwargs=True
        )
    return model


@pytest.mark.parametrize("make", [encoder, chained])
def test_blocks_are_computed_where_others_depend_on_it(make: Any) -> None:
    tokens, _ = computed_tokens(make(), [TokenBatch(IDS)])
    assert tokens >= IDS.numel()


def test_on_a_cpu_batches_go_through_the_blocks_in_parts_of_whole_sequences() -> None:
    ids = torch.arange(7 * 600).view(7, 600)
    mask = ids % 5 > 0
    whole = TokenBatch(ids, mask)
    pictures = TokenBatch(ids, None, {"pixel_values": torch.zeros(7, 3)})
    parts = split_into_passes([whole, pictures])
    assert [len(part.input_ids) for part in parts] == [3, 3, 1, 7]
    assert torch.equal(torch.cat([part.input_ids for part in parts[:3]]), ids)
    assert torch.equal(torch.cat([part.attention_mask for part in parts[:3] if part.attention_mask is not None]), mask)
    assert parts[3] is pictures
