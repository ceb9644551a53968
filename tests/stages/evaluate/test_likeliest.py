"""Calibration and agreement of likeliest bytes, against their definitions."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from bytecache.stages.evaluate.likeliest import Agreement, Calibration
from bytecache.stages.train.batches.types import MicroBatch, SlotTargets


def test_calibration_error_is_that_of_its_definition():
    generator = np.random.default_rng(0)
    scores = generator.normal(size=(500, 7)) * 3
    true = generator.integers(0, 7, 500)
    calibration = Calibration()
    for part in np.split(np.arange(500), [100, 101, 350]):
        calibration.add(torch.from_numpy(scores[part]), torch.from_numpy(true[part]))
    p = np.exp(scores) / np.exp(scores).sum(1, keepdims=True)
    confidence, right = p.max(1), p.argmax(1) == true
    error = 0.0
    for low in range(15):
        inside = (confidence >= low / 15) & ((confidence < (low + 1) / 15) | (low == 14))
        if inside.any():
            error += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    assert calibration.error == pytest.approx(error, rel=1e-9) and error > 0.1
    perfect = Calibration()
    perfect.add(torch.tensor([[50.0, 0.0]]), torch.tensor([0]))
    assert perfect.error == pytest.approx(0)


def slots(targets: SlotTargets, counts: list[int]) -> MicroBatch:
    """A micro-batch of which nothing but its slots and their targets is asked."""
    none = torch.zeros(0)
    return MicroBatch(none, none, none, counts, none, none, targets, 0, 0, 0, [])


def test_agreement_is_of_the_places_whose_likeliest_byte_the_teacher_lists():
    generator = np.random.default_rng(0)
    n, symbols = 400, 9
    scores = torch.from_numpy(generator.normal(size=(n + 5, symbols)))
    entries, equal, places = [], 0, 0
    tail = generator.random(n) * 0.6
    first = 300
    for slot in range(n):
        listed = generator.choice(symbols, 3, replace=False)
        prob = generator.dirichlet(np.ones(3)) * (1 - tail[slot])
        entries += [(slot, int(s), float(p)) for s, p in zip(listed, prob, strict=True)]
        if slot < first and prob.max() > tail[slot]:
            places += 1
            equal += int(scores[slot].argmax()) == listed[prob.argmax()]
    order = generator.permutation(len(entries))
    slot, symbol, prob = (torch.tensor(column) for column in zip(*(entries[at] for at in order), strict=True))
    micro = slots(SlotTargets(slot, symbol, prob.float(), torch.from_numpy(tail).float()), [first, n - first])
    agreement = Agreement()
    agreement.add(scores, micro)
    assert agreement.share == pytest.approx(equal / places) and 0 < equal < places < first
    untaught = replace(micro, targets=SlotTargets(slot[:0], symbol[:0], prob[:0].float(), torch.ones(n)))
    agreement.add(scores, untaught)
    assert agreement.places == places, "a place of which nothing is listed does not count"
    assert Agreement().share is None
