"""Compressed layers give the same bits in many threads, after a fork, in spawned workers, and in data loaders."""

import multiprocessing
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, PreTrainedModel

from tests.fuzz.checkpoints import save_checkpoints
from tests.support.assets import PROJECT

LAYOUTS = ("slab", "sola", "quantised", "pivoted")


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {folder.name: folder for folder in save_checkpoints(tmp_path_factory.mktemp("sources"))}


def questions(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(64, (1, 8), generator=generator) for _ in range(count)]


def answer(model: PreTrainedModel, question: Tensor) -> Tensor:
    with torch.inference_mode():
        return model(question).logits.clone()


def answers_of_a_worker(folder: str, count: int, queue: "multiprocessing.Queue[list[list[float]]]") -> None:
    """Answer questions in a worker process, and put the answers in the queue as plain numbers.

    The worker uses the model that it was forked with, or opens it from its folder.
    """
    torch.set_num_threads(1)
    model = FORKED.get(folder) or AutoModelForCausalLM.from_pretrained(folder)
    queue.put([answer(model, question).flatten().tolist() for question in questions(count)])


FORKED: dict[str, PreTrainedModel] = {}
"""The models by their folders that a fork brings along."""


class Answers(Dataset[Tensor]):
    """A data set whose items are a model's answers, which a worker of the data loader computes."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder)
        self.questions = questions(6)

    def __len__(self) -> int:
        return len(self.questions)

    def __getitem__(self, index: int) -> Tensor:
        return answer(self.model, self.questions[index])[0]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_many_threads_get_the_answers_of_one(sources: dict[str, Path], layout: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(sources[layout])
    serial = [answer(model, question) for question in questions(8)]
    with ThreadPoolExecutor(8) as pool:
        for _ in range(4):
            parallel = pool.map(lambda question: answer(model, question), questions(8))
            for first, second in zip(serial, parallel, strict=True):
                assert torch.equal(first, second)


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_worker_processes_get_the_answers_of_this_one(
    sources: dict[str, Path], start: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = str(sources["slab"])
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # sums depend on the number of threads, and OpenMP's threads do not survive a fork
    try:
        model = AutoModelForCausalLM.from_pretrained(folder)
        expected = [answer(model, question).flatten().tolist() for question in questions(4)]
        if start == "fork":
            monkeypatch.setitem(FORKED, folder, model)
        monkeypatch.setenv("PYTHONPATH", str(PROJECT))  # a spawned process imports this file
        context = multiprocessing.get_context(start)
        queue: multiprocessing.Queue[list[list[float]]] = context.Queue()
        workers = [context.Process(target=answers_of_a_worker, args=(folder, 4, queue)) for _ in range(2)]
        for worker in workers:
            worker.start()
        answers = [queue.get(timeout=120) for _ in workers]
        for worker in workers:
            worker.join(timeout=60)
            assert worker.exitcode == 0
        assert answers == [expected, expected]
    finally:
        torch.set_num_threads(threads)


def test_workers_of_a_data_loader_get_the_answers_of_this_process(sources: dict[str, Path]) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # every worker of a data loader has one thread too
    try:
        data = Answers(sources["slab"])
        alone = torch.stack([data[index] for index in range(len(data))])
        loaded = torch.cat(list(DataLoader(data, batch_size=2, num_workers=2, timeout=120)))
        assert torch.equal(alone, loaded)
    finally:
        torch.set_num_threads(threads)
