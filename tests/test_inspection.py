"""Calls of functional dropout are found in the source code of a model's classes."""

from pathlib import Path

import torch
import torch.nn.functional as F
import torch.nn.functional as functional
from torch import dropout as torch_dropout
from torch import nn
from torch.nn.functional import alpha_dropout, scaled_dot_product_attention

from approxdrop_lightning.inspection import functional_dropouts


class Aliases(nn.Module):
    def forward(self, x):
        x = F.dropout(x, 0.1) + functional.dropout2d(x) + nn.functional.dropout3d(x)
        return torch_dropout(alpha_dropout(x), 0.1, True) + torch.nn.functional.dropout1d(
            torch.dropout_(x, 0.1, True)
        )


class Attentive(nn.Module):
    rate = 0.1

    def forward(self, q):
        plain = scaled_dot_product_attention(q, q, q) + F.scaled_dot_product_attention(q, q, q, dropout_p=0)
        by_name = F.scaled_dot_product_attention(q, q, q, dropout_p=self.rate if self.training else 0.0)
        return plain + by_name + scaled_dot_product_attention(q, q, q, None, 0.2)


class Others(nn.Module):
    """Mentions F.dropout(x), and calls functions of the name that are no dropout."""

    def dropout(self, x):
        return x

    def forward(self, x):
        F = {"dropout": abs}  # hides the module, which is not followed
        return self.dropout(x) + F["dropout"](x)


def found(model):
    return [(name, place.split(":")[0], reason) for name, place, reason in functional_dropouts(model)]


def test_calls_are_found_by_what_their_names_refer_to():
    assert len(found(Aliases())) == 7
    assert all("nn.Dropout" in reason for _, _, reason in found(Aliases()))
    # Those that units are dropped by, in the order of `ast.walk`: the others are no dropout of graphs either.
    assert sum("only in graphs of torch.compile" in reason for _, _, reason in found(Aliases())) == 3


def test_attention_counts_if_it_has_a_dropout_rate():
    assert [reason for *_, reason in found(Attentive())] == ["dropout inside attention is left as it is"] * 2


def test_each_class_is_searched_once_and_places_are_lines_of_files():
    model = nn.Sequential(Aliases(), Aliases(), nn.Dropout(0.5))
    assert [name for name, *_ in found(model)] == ["0"] * 7
    lines = Path(__file__).read_text(encoding="utf-8").splitlines()
    for _, place, _ in functional_dropouts(model):
        file, _, line = place.partition(":")
        assert file == "test_inspection.py" and "dropout" in lines[int(line) - 1]


def test_other_functions_and_classes_without_source_are_passed_over():
    assert found(Others()) == []
    assert found(type("Made", (nn.Module,), {"forward": lambda self, x: F.dropout(x)})()) == []
