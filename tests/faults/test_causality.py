"""F37: planted leaks are found and named, clean models are left alone."""

import pytest
import torch

import leaks
from peer_scaling.causality import probe

SEEDS = range(5)
CPU = torch.device("cpu")


def probed(losses, **options):
    return probe(losses, leaks.VOCAB, leaks.CONTEXT, CPU, **options)


def options_of(name):
    return {"document_end": leaks.END} if name == "document border" else {}


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", leaks.LEAKS)
def test_a_planted_leak_is_found_and_named(name, seed):
    found = probed(leaks.planted(name, seed), **options_of(name))
    assert {leak.kind for leak in found.leaks} == leaks.LEAKS[name], found.reason


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("name", leaks.CLEAN)
def test_a_clean_model_is_left_alone(name, seed):
    found = probed(leaks.clean(name, seed))
    assert found.reason is None
    assert found.batch_coupled == leaks.CLEAN[name].batch_coupled
