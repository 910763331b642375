"""What no target honours."""

import dataclasses

import pytest
import torch

from edgefuse.fold import fold
from edgefuse.lower import lower
from edgefuse_targets.programs import lacking, refusals_of


@pytest.fixture
def program(fusionformer):
    return lower(fold(fusionformer), [0.64], "fp32")


def test_a_deployment_graph_is_honoured(program):
    assert list(refusals_of(program)) == []


def test_no_entry_is_refused(program):
    assert list(refusals_of(dataclasses.replace(program, entries=()))) == ["The program has no entry."]


def test_a_graph_in_training_mode_is_refused(program):
    program.entries[0].graph.train()
    (sentence,) = refusals_of(program)
    assert "training mode" in sentence


def test_weights_of_another_type_are_refused(program):
    program.entries[0].graph.to(torch.float64)
    (sentence,) = refusals_of(program)
    assert "float64" in sentence


def test_an_entry_twice_is_refused_once(program):
    (sentence,) = refusals_of(dataclasses.replace(program, entries=program.entries * 3))
    assert program.entries[0].name in sentence


def test_what_is_lacking_is_told_as_pip_wants_it():
    assert lacking({"json": "json==1", "no_such_module_anywhere": "no-such==2"}) == ["no-such==2"]
