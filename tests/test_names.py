"""Names of tensors: what wrappers add is taken off, and two models of one family are brought together whatever their prefixes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sterna.errors import PairingError
from sterna.sources.names import align, is_embedding, is_head, last, near, plain, some, swap_prefix

WRAPPERS = [
    "module.",  # DataParallel, DistributedDataParallel
    "_orig_mod.",  # torch.compile
    "module._orig_mod.",
    "_orig_mod.module.",
    "_fsdp_wrapped_module.",
    "_orig_mod._fsdp_wrapped_module.",
    "_fsdp_wrapped_module._orig_mod.",
    "module._fsdp_wrapped_module.",
    "base_model.model.",  # PEFT
    "module.base_model.model.",
    "_orig_mod.base_model.model.",
]
NAMES = [
    "bert.encoder.layer.0.attention.self.query.weight",
    "model.layers.11.mlp.down_proj.weight",
    "transformer.wte.weight",
    "lm_head.weight",
    "weight",
    "logit_scale",
]
name_parts = st.sampled_from(
    ["bert", "model", "encoder", "layer", "0", "1", "attention", "dense", "LayerNorm", "weight", "bias", "module_list", "norm"]
)
names = st.lists(name_parts, min_size=1, max_size=6).map(".".join)


@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.parametrize("name", NAMES)
def test_what_wraps_a_model_is_taken_off(name: str, wrapper: str) -> None:
    assert plain(wrapper + name) == name


@pytest.mark.parametrize(
    "inner", ["_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_fsdp_wrapped_module._checkpoint_wrapped_module"]
)
def test_what_wraps_a_part_is_taken_off(inner: str) -> None:
    assert plain(f"model.layers.0.{inner}.mlp.down_proj.weight") == "model.layers.0.mlp.down_proj.weight"
    assert plain(f"{inner}.weight") == "weight"


@pytest.mark.parametrize(
    ("wrapped", "name"),
    [
        ("base_model.model.bert.encoder.layer.0.query.base_layer.weight", "bert.encoder.layer.0.query.weight"),
        ("base_model.model.classifier.original_module.weight", "classifier.weight"),
        ("base_model.model.classifier.modules_to_save.default.weight", "classifier.weight"),
        ("classifier.modules_to_save.some-task.dense.bias", "classifier.dense.bias"),
    ],
)
def test_what_peft_adds_is_taken_off(wrapped: str, name: str) -> None:
    assert plain(wrapped) == name


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("bert.embeddings.LayerNorm.gamma", "bert.embeddings.LayerNorm.weight"),
        ("bert.embeddings.LayerNorm.beta", "bert.embeddings.LayerNorm.bias"),
        ("h.0.layer_norm.gamma", "h.0.layer_norm.weight"),
        ("norm.beta", "norm.bias"),
        ("stages.0.layer_scale.gamma", "stages.0.layer_scale.gamma"),
        ("grn.beta", "grn.beta"),
        ("LayerNorm.gamma.weight", "LayerNorm.gamma.weight"),
        ("gamma", "gamma"),
    ],
)
def test_norms_have_todays_names(old: str, new: str) -> None:
    assert plain(old) == new


@pytest.mark.parametrize("name", ["submodule.weight", "my_module.weight", "model.modules.weight", "x_orig_mod.weight", "layers.module_list.0.weight"])
def test_names_that_only_look_like_wrappers_stay(name: str) -> None:
    assert plain(name) == name


@given(st.lists(st.sampled_from(WRAPPERS), max_size=1), names)
def test_taking_off_is_done_at_once(wrapper: list[str], name: str) -> None:
    once = plain("".join(wrapper) + name)
    assert plain(once) == once == plain(name)


# Bringing two models together


def shapes(*names: str, shape: tuple[int, ...] = (2, 2)) -> dict[str, tuple[int, ...]]:
    return dict.fromkeys(names, shape)


@given(st.dictionaries(names, st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=12))
def test_a_model_meets_itself(base: dict[str, tuple[int, ...]]) -> None:
    distinct = {plain(name): shape for name, shape in base.items()}
    found = align(distinct, distinct)
    assert found.to_other == {name: name for name in distinct}
    assert (found.base_prefix, found.other_prefix) == ("", "")


@given(st.dictionaries(names, st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=12), st.sampled_from(["bert.", "a.b."]))
def test_a_model_meets_itself_behind_a_prefix(base: dict[str, tuple[int, ...]], prefix: str) -> None:
    inner = {f"encoder.{plain(name)}": shape for name, shape in base.items()}
    outer = {prefix + name: shape for name, shape in inner.items()}
    assert align(inner, outer).to_other == {name: prefix + name for name in inner}
    assert align(outer, inner).to_other == {prefix + name: name for name in inner}


def test_a_head_beside_the_prefix_does_not_get_in_the_way() -> None:
    bare = shapes(*(f"encoder.layer.{i}.weight" for i in range(4)), "pooler.weight")
    whole = {f"bert.{name}": shape for name, shape in bare.items()} | shapes("classifier.weight", "classifier.bias")
    up = align(bare, whole)
    assert (up.base_prefix, up.other_prefix) == ("", "bert.")
    assert set(up.to_other.values()) == {name for name in whole if name.startswith("bert.")}
    assert up.other_of("encoder.layer.9.weight") == "bert.encoder.layer.9.weight"
    down = align(whole, bare)
    assert (down.base_prefix, down.other_prefix) == ("bert.", "")
    assert "classifier.weight" not in down.to_other
    assert down.other_of("bert.pooler.weight") == "pooler.weight"
    assert down.other_of("classifier.weight") == "classifier.weight"


def test_two_prefixes_of_other_names() -> None:
    base = shapes(*(f"roberta.encoder.{i}.weight" for i in range(3)))
    other = shapes(*(f"backbone.encoder.{i}.weight" for i in range(3)), "score.weight")
    found = align(base, other)
    assert found.to_other == {f"roberta.encoder.{i}.weight": f"backbone.encoder.{i}.weight" for i in range(3)}


def test_shapes_decide_between_two_candidates() -> None:
    base = {f"layer.{i}.weight": (4, 4) for i in range(3)}
    other = {f"student.layer.{i}.weight": (2, 2) for i in range(3)} | {f"teacher.layer.{i}.weight": (4, 4) for i in range(3)}
    assert set(align(base, other).to_other.values()) == {f"teacher.layer.{i}.weight" for i in range(3)}


def test_unknown_shapes_agree_with_any() -> None:
    base = {"layer.weight": None, "bias": (3,)}
    assert align(base, shapes("layer.weight", "bias", shape=(3,))).to_other == {"layer.weight": "layer.weight", "bias": "bias"}
    assert align({"a.weight": (2, 2)}, {"a.weight": None}).to_other == {"a.weight": "a.weight"}


def test_a_name_that_agrees_but_for_its_shape_is_matched_all_the_same() -> None:
    base = shapes("embed.weight", "layer.weight")
    found = align(base, {"embed.weight": (3, 2), "layer.weight": (2, 2)})
    assert found.to_other == {"embed.weight": "embed.weight", "layer.weight": "layer.weight"}


def test_no_tensor_is_matched_twice() -> None:
    """Swapping "one." for "two." would bring both of the base's tensors to the same one."""
    base = shapes("one.weight", "two.weight")
    assert align(base, {"one.weight": (9, 9), "two.weight": (2, 2)}).to_other == {"one.weight": "one.weight", "two.weight": "two.weight"}
    found = align(base, shapes("two.weight")).to_other
    assert found == {"two.weight": "two.weight"}


def test_wrapped_and_legacy_names_keep_what_they_are_called() -> None:
    base = shapes("bert.LayerNorm.gamma", "bert.dense.weight")
    other = shapes("module.bert.LayerNorm.weight", "module.bert.dense.weight")
    assert align(base, other).to_other == {"bert.LayerNorm.gamma": "module.bert.LayerNorm.weight", "bert.dense.weight": "module.bert.dense.weight"}


@pytest.mark.parametrize("other", [shapes("other.bias"), shapes("layer.weight", shape=(3, 3)), {}])
def test_nothing_in_common_is_an_error_with_names_of_both(other: dict[str, tuple[int, ...]]) -> None:
    with pytest.raises(PairingError, match=r"one has layer\.weight; the other has"):
        align(shapes("layer.weight"), other)


# Kinds of tensor


@pytest.mark.parametrize(
    ("name", "prefix", "head"),
    [
        ("classifier.weight", "bert.", True),
        ("classifier.out_proj.weight", "roberta.", True),
        ("score.weight", "model.", True),
        ("qa_outputs.bias", "bert.", True),
        ("bert.classifier.weight", "bert.", True),
        ("lm_head.weight", "model.", False),
        ("bert.encoder.classifier.weight", "bert.", False),
        ("classifiers.0.weight", "", False),
        ("bert.pooler.dense.weight", "bert.", False),
    ],
)
def test_heads_are_known_by_their_module(name: str, prefix: str, head: bool) -> None:
    assert is_head(name, prefix) is head


@pytest.mark.parametrize(
    ("name", "table"),
    [
        ("bert.embeddings.word_embeddings.weight", True),
        ("model.embed_tokens.weight", True),
        ("transformer.wte.weight", True),
        ("transformer.wpe.weight", True),
        ("shared.weight", True),
        ("lm_head.weight", True),
        ("tok_embeddings.weight", True),
        ("model.layers.0.mlp.up_proj.weight", False),
        ("classifier.weight", False),
        ("embed_tokens", False),
    ],
)
def test_embeddings_are_known_by_their_module(name: str, table: bool) -> None:
    assert is_embedding(name) is table


def test_small_helpers() -> None:
    assert last("a.b.weight") == "weight"
    assert last("weight") == "weight"
    assert swap_prefix("bert.a", "bert.", "") == "a"
    assert swap_prefix("a", "", "bert.") == "bert.a"
    assert swap_prefix("other.a", "bert.", "x.") == "other.a"
    assert some(["a", "b"]) == "a, b"
    assert some("abcdef", most=2) == "a, b and 4 more"
    assert some([]) == ""
    assert near("clasifier.weight", ["classifier.weight", "pooler.weight", "x"])[0] == "classifier.weight"
    assert near("zzz", ["classifier.weight"]) == []
