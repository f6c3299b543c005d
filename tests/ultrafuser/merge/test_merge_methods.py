"""Each method of merging, on two changes of six numbers, worked out by hand."""

import json

import pytest
import torch

from tests.support.tiny import specialist
from ultrafuser.evaluation.measurement import HeldOut
from ultrafuser.merge import merge_method
from ultrafuser.merge.coefficients import Coefficients, check_layers, parse_coefficients, row_of
from ultrafuser.merge.layer_inputs import inner_products
from ultrafuser.merge.merge_base import NotMergeableError
from ultrafuser.merge.merged_model import merge


ONE = torch.tensor([4, -1, 0.5, 0, -3, 2])
TWO = torch.tensor([2, 2, -0.5, 1, -1, 0])


def combined(method, changes=(ONE, TWO), weights=(1.0, 1.0), **inputs):
    return merge_method(method).combined(list(changes), torch.tensor(weights), **inputs).tolist()


@pytest.mark.filterwarnings("ignore:The density 1.0")
@pytest.mark.parametrize(
    ("method", "expected"),
    [
        ("task_arithmetic", [6, 1, 0, 1, -4, 2]),
        ("ties:0.5", [3, 2, 0, 0, -2, 2]),
        ("ties:1", [3, 2, 0.5, 1, -2, 2]),
        ("dare:1", [6, 1, 0, 1, -4, 2]),
        ("pcb:0.5", [2.5, 2, 0, 0, -3, 0]),
        ("average", [3, 0.5, 0, 0.5, -2, 1]),
    ],
)
def test_a_method_gives_what_it_gives_by_hand(method, expected):
    assert combined(method) == pytest.approx(expected, abs=1e-5)


def test_breadcrumbs_keeps_the_largest_but_for_outliers_in_every_row():
    row = torch.tensor([10, -3, 2, 1, 0.5, -0.1, 0, 4, -5, 6])
    kept = [0, 0, 0, 0, 0, 0, 0, 4, -5, 6]
    change = torch.stack([row, row.flip(0)])
    assert combined("breadcrumbs:0.3,0.1", [change], [1.0]) == [kept, kept[::-1]]
    assert combined("breadcrumbs:0.3,0.1", [row, row], [0.5, -0.5]) == [0] * 10


def test_model_stock_takes_the_average_if_changes_agree_and_nothing_if_they_are_orthogonal():
    assert combined("model_stock", [ONE, ONE]) == pytest.approx(ONE.tolist())
    assert combined("model_stock", [torch.tensor([1.0, 0]), torch.tensor([0, 1.0])]) == [0, 0]
    # a cosine of 1/2: t = 2 c / (1 + c) = 2/3 of the average
    change = [torch.tensor([1.0, 0, 1]), torch.tensor([0, 1.0, 1])]
    assert combined("model_stock", change) == pytest.approx([1 / 3, 1 / 3, 2 / 3])
    assert combined("model_stock", [ONE], [1.0]) == ONE.tolist()


def test_regmean_is_the_average_where_inputs_are_alike_and_exact_where_layers_read_different_ones():
    one, two = torch.randn(3, 2), torch.randn(3, 2)
    alike = [torch.tensor([[2.0, 0.5], [0.5, 1.0]])] * 2
    torch.testing.assert_close(torch.tensor(combined("regmean", (one, two), inputs=alike)), (one + two) / 2)
    apart = [torch.diag(torch.tensor([1.0, 0.0])), torch.diag(torch.tensor([0.0, 1.0]))]
    found = torch.tensor(combined("regmean:1", (one, two), inputs=apart))
    torch.testing.assert_close(found, torch.stack([one[:, 0], two[:, 1]], 1))
    # off-diagonals are multiplied by the setting
    full = [torch.randn(8, 2) for _ in range(2)]
    products = [x.T @ x for x in full]
    less = [g * torch.tensor([[1, 0.5], [0.5, 1]]) for g in products]
    expected = torch.linalg.solve(sum(less), less[0] @ one.T + less[1] @ two.T).T
    torch.testing.assert_close(
        torch.tensor(combined("regmean:0.5", (one, two), inputs=products)), expected, rtol=1e-4, atol=1e-4
    )


def test_inner_products_are_those_of_what_a_layer_reads_padding_left_out():
    model, ids = specialist(), torch.tensor([[5, 6, 7], [8, 9, 0]])
    mask = torch.tensor([[1, 1, 1], [1, 1, 0]])
    layer = model.model.layers[1].mlp.down_proj
    read = []
    hook = layer.register_forward_pre_hook(lambda _, inputs: read.append(inputs[0]))
    found = inner_products(model, HeldOut(ids, mask, mask.bool()))
    hook.remove()
    kept = read[0][mask.bool()]
    torch.testing.assert_close(found["model.layers.1.mlp.down_proj"], kept.T @ kept / 5)
    assert "lm_head" in found
    assert not any("embed" in name for name in found)
    assert "lm_head" not in inner_products(specialist(tied=True), HeldOut(ids, mask, mask.bool()))


def test_layer_swapping_takes_rows_of_two_specialists_to_the_bit():
    math, language = (specialist(layers=5) for _ in range(2))
    merged = merge({"math": math, "language": language}, "layer_swap:1,1").state_dict()
    one, two = math.state_dict(), language.state_dict()
    for key, tensor in merged.items():
        row = row_of(key, 5)
        if row in (2, 4):
            torch.testing.assert_close(tensor, (one[key] + two[key]) / 2)
        else:
            assert torch.equal(tensor, (one if row == 3 else two)[key])
    table = merge_method("layer_swap").table(["a", "b"], 12)
    assert [row[1] for row in table.rows] == [1, 1, 1, 0.5, 0, 0, 0, 0, 0, 0, 0.5, 1, 1, 1]


def test_layer_swapping_is_refused_for_three_and_where_nothing_is_left():
    with pytest.raises(NotMergeableError, match="there are 3: .*Name two"):
        merge_method("layer_swap").table(["a", "b", "c"], 12)
    with pytest.raises(NotMergeableError, match="2 and 1 of 5 layers leave fewer than three"):
        merge_method("layer_swap:2,1").table(["a", "b"], 5)


@pytest.mark.parametrize(
    "word",
    ["pcb:0", "breadcrumbs:1", "breadcrumbs:0.5,2", "regmean:2", "layer_swap:1", "layer_swap:a,b", "model_stock:1"],
)
def test_what_is_no_setting_is_rejected(word):
    with pytest.raises(ValueError, match="But got|has no setting"):
        merge_method(word)


# --------------------------------------------------------------------------------------------- coefficients


def test_a_table_that_gives_one_specialist_all_is_that_specialist_to_the_bit_and_a_negative_one_subtracts():
    base, one, two = specialist(), specialist(), specialist()
    models = {"one": one, "two": two}
    only = merge(
        models, "task_arithmetic", base=base, coefficients=parse_coefficients("one=0,two=1", 1, list(models), 2)
    )
    assert all(torch.equal(t, two.state_dict()[key]) for key, t in only.state_dict().items())
    less = merge(models, "task_arithmetic", base=base, coefficients=Coefficients.constant({"one": 1, "two": -1}, 2))
    for key, tensor in less.state_dict().items():
        expected = base.state_dict()[key] + one.state_dict()[key] - two.state_dict()[key]
        torch.testing.assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_factors_of_1_over_their_number_are_the_average_and_no_slope_is_no_lines():
    base, models = specialist(), {name: specialist() for name in "ab"}
    table = Coefficients.lines("ab", 2, 0.5, 0.0)
    assert table == Coefficients.constant(dict.fromkeys("ab", 0.5), 2)
    average = merge(models, "average").state_dict()
    for key, tensor in merge(models, "task_arithmetic", base=base, coefficients=table).state_dict().items():
        torch.testing.assert_close(tensor, average[key], rtol=1e-4, atol=1e-5)


def test_lines_rises_over_the_layers_alone():
    rows = Coefficients.lines("abc", 4, 1 / 3, 0.5).rows
    assert [row[0] for row in rows] == pytest.approx([1 / 3, 1 / 3, 0.5, 2 / 3, 5 / 6, 1 / 3])


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("model.embed_tokens.weight", 0),
        ("transformer.wpe.weight", 0),
        ("gpt_neox.embed_in.weight", 0),
        ("embed_out.weight", 4),
        ("model.layers.0.mlp.up_proj.weight", 1),
        ("transformer.h.2.attn.c_attn.bias", 3),
        ("model.norm.weight", 4),
        ("lm_head.weight", 4),
    ],
)
def test_a_parameter_belongs_to_the_row_that_its_name_tells(key, row):
    assert row_of(key, 3) == row


def test_a_tied_head_is_merged_once_as_the_embedding():
    base, one = specialist(tied=True), specialist(tied=True)
    table = Coefficients(["one"], [[0.0], [1.0], [1.0], [1.0]])
    merged = merge({"one": one}, "task_arithmetic", base=base, coefficients=table)
    torch.testing.assert_close(merged.lm_head.weight, base.lm_head.weight)
    assert torch.equal(merged.model.norm.weight, one.model.norm.weight)


def test_layers_that_cannot_be_counted_are_refused():
    with pytest.raises(ValueError, match="o parameter is called after layer 0 of 2.*one factor for all"):
        check_layers(["blocks.first.weight", "lm_head.weight"], 2)


@pytest.mark.parametrize(
    "table",
    [
        None,
        {"embeddings": {"a": 1}, "layer 0": {"a": 1}, "last norm and head": {"a": 1}},
        {"layer 0": {"a": 1}, "layer 1": {"a": 1}, "embeddings": {"a": 1}, "last norm and head": {"a": 1}},
        {"embeddings": {"a": 1}, "layer 0": {"a": 1}, "layer 1": 1, "last norm and head": {"a": 1}},
    ],
)
def test_a_table_of_another_shape_is_refused(table, tmp_path):
    (tmp_path / "table.json").write_text(json.dumps({"coefficients": table}))
    told = (
        "no table `coefficients` with the 4 rows 'embeddings', 'layer 0' to 'last norm and head'. .*file that a merge"
    )
    with pytest.raises(ValueError, match=told):
        parse_coefficients(str(tmp_path / "table.json"), 1.0, ["a"], 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a=1", "names \\['a'\\], and the specialists are \\['a', 'b'\\]"),
        ("a=1,b=much", "gives 'b' 'much'"),
        ("nan", "gives 'a' 'nan'"),
        ("a=1,b=2,c=3", "Name them all"),
        ("a=1,a=2,b=3", "names a specialist twice"),
    ],
)
def test_coefficients_that_are_none_are_refused(text, message):
    with pytest.raises(ValueError, match=message):
        parse_coefficients(text, 1.0, ["a", "b"], 2)
