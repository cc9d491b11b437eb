"""Templates, labels from role spans, truncation and prompts, against what the published code produced."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file

from megatron_eve.data.text.conversation import (
    IGNORE_INDEX,
    IMAGE_TOKEN_ID,
    Encoded,
    encode_conversation,
)
from megatron_eve.data.text.prompts import encode_prompt
from megatron_eve.data.text.tokenizer import Tokenizer
from megatron_eve.data.text.turns import ConversationError, is_blank
from tests.data.helpers import turns
from tests.golden_dir import find_golden


def golden_cases() -> dict[str, Any]:
    path = find_golden("tokenize") / "cases.json"
    return json.loads(path.read_text(encoding="utf-8"))["legacy_true"]


def placeholders(conversation: list[dict[str, str]]) -> int:
    return sum(turn["value"].count("<image>") for turn in conversation)


def trained(encoded: Encoded, tokenizer: Tokenizer) -> str:
    """The text that trains, `</s>` shown as "|"."""
    ids = [label for label in encoded.labels if label != IGNORE_INDEX]
    text, stretch = "", []
    for token in [*ids, None]:
        if token is None or token == tokenizer.eos_id:
            text += tokenizer.decode(stretch) + ("|" if token is not None else "")
            stretch = []
        else:
            stretch.append(token)
    return text


@pytest.mark.parametrize("template", ["v1", "plain"])
def test_tokens_and_labels_of_every_golden_case(tokenizer: Tokenizer, template: str) -> None:
    cases = golden_cases()[template]
    assert len(cases) == {"v1": 7, "plain": 3}[template]
    for case in cases:
        conversation = case["conversations"]
        name = {"v1": "vicuna_v1", "plain": "plain"}[template]
        encoded = encode_conversation(conversation, tokenizer, name, placeholders(conversation))
        assert encoded.tokens == case["input_ids"], case["name"]
        assert encoded.labels == case["labels"], case["name"]
        assert encoded.num_labels == case["n_trained"], case["name"]


def test_golden_truncation(tokenizer: Tokenizer) -> None:
    cases = {case["name"]: case for case in golden_cases()["v1_truncated_model_max_length_60"]}
    text_only = cases["text_only_single"]
    encoded = encode_conversation(text_only["conversations"], tokenizer, "vicuna_v1", 0).cut(60)
    assert (encoded.tokens, encoded.labels) == (text_only["input_ids"], text_only["labels"])
    # The published code cuts a row with an image later, when it collates: the same first positions.
    with_image = cases["image_first_single"]
    encoded = encode_conversation(with_image["conversations"], tokenizer, "vicuna_v1", 1).cut(120)
    assert (encoded.tokens, encoded.labels) == (with_image["input_ids"][:120], with_image["labels"][:120])
    assert encoded.num_images == 1


@pytest.mark.parametrize(("case", "reason"), [(0, "plain_without_image"), (1, "plain_turns")])
def test_golden_conversations_that_plain_refuses(tokenizer: Tokenizer, case: int, reason: str) -> None:
    refused = golden_cases()["plain_errors"][case]
    with pytest.raises(ConversationError) as error:
        encode_conversation(refused["conversations"], tokenizer, "plain", int(refused["has_image"]))
    assert error.value.reason == reason


def test_golden_evaluation_prompts(tokenizer: Tokenizer) -> None:
    for case in golden_cases()["eval_prompts"]:
        system = case["prompt"].split(" USER:")[0]
        found = encode_prompt(case["question"], tokenizer, "vicuna_v1", 1, system=system)
        assert found == case["input_ids"]
    training_system = golden_cases()["eval_prompts"][0]
    assert (
        encode_prompt(training_system["question"], tokenizer, "vicuna_v1", 1) == training_system["input_ids"]
    )


def test_rows_of_the_golden_batch(tokenizer: Tokenizer) -> None:
    folder = find_golden("mini224_mixed")
    inputs = load_file(folder / "inputs.safetensors")
    for row, record in enumerate(json.loads((folder / "records.json").read_text())):
        encoded = encode_conversation(record["conversations"], tokenizer, "vicuna_v1", int("image" in record))
        length = int(inputs["attention_mask"][row].sum())
        assert encoded.tokens == inputs["input_ids"][row, :length].tolist()
        assert encoded.labels == inputs["labels"][row, :length].tolist()


def test_an_empty_answer_trains_nothing_and_spares_the_others(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(turns("One?", "", "Two?", "Yes."), tokenizer, "vicuna_v1", 0)
    assert trained(encoded, tokenizer) == "Yes.|"
    # The prompt is the published one: nothing stands between "ASSISTANT:" and the next "USER:".
    assert "ASSISTANT:USER: Two?" in tokenizer.decode(encoded.tokens)
    assert encode_conversation(turns("<image>", ""), tokenizer, "plain", 1).num_labels == 0


@pytest.mark.parametrize(
    "answer",
    [
        "It says ASSISTANT: hello",  # the published code loses this row to a mismatch
        "USER: me ASSISTANT: you",
        " leading and trailing ",
        "a\n\nb\t",
        "猫 é 🐱",
        "<0x0A>",
        "▁",
    ],
)
def test_the_answer_and_its_end_train_whatever_they_hold(tokenizer: Tokenizer, answer: str) -> None:
    encoded = encode_conversation(turns("Q?", answer, "R?", "Fine."), tokenizer, "vicuna_v1", 0)
    assert trained(encoded, tokenizer) == f"{answer.replace('▁', ' ')}|Fine.|"


def test_control_pieces_in_an_answer_become_ids_and_train(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(turns("Q?", "a</s>b<unk>"), tokenizer, "vicuna_v1", 0)
    labels = [label for label in encoded.labels if label != IGNORE_INDEX]
    piece = tokenizer.encode
    assert labels == [*piece("a"), 2, *piece("b"), 0, 2]


def test_a_lone_image_moves_to_the_front_of_its_sentence(tokenizer: Tokenizer) -> None:
    def encode(*texts: str) -> list[int]:
        return encode_conversation(turns(*texts, "A."), tokenizer, "vicuna_v1", 1).tokens

    assert encode("What is it?\n<image>") == encode("<image>\nWhat is it?")
    assert encode("What <image> is it? ") == encode("<image>\nWhat  is it?")
    # It moves inside its own sentence, not to the first turn.
    second = encode("Hi.", "Hello.", "See: <image>")
    assert second == encode("Hi.", "Hello.", "<image>\nSee:")
    assert second.index(IMAGE_TOKEN_ID) > len(encode_prompt("Hi.", tokenizer, "vicuna_v1", 0))


def test_several_images_stay_where_they_are(tokenizer: Tokenizer) -> None:
    question = "First <image> then <image> end."
    encoded = encode_conversation(turns(question, "Two."), tokenizer, "vicuna_v1", 2)
    first, second = [at for at, token in enumerate(encoded.tokens) if token == IMAGE_TOKEN_ID]
    assert tokenizer.decode(encoded.tokens[:first]).endswith("USER: First ")
    # After an image a text begins with a piece of its own, as at the start: decoding takes it off again.
    assert tokenizer.decode(encoded.tokens[first + 1 : second]) == " then "
    assert tokenizer.decode(encoded.tokens[second + 1 :]).startswith(" end. ASSISTANT: Two.")
    assert trained(encoded, tokenizer) == "Two.|"
    one_each = encode_conversation(turns("a <image>", "A.", "<image> b", "B."), tokenizer, "vicuna_v1", 2)
    assert one_each.num_images == 2
    assert trained(one_each, tokenizer) == "A.|B.|"


def test_plain_takes_several_images_in_front_of_the_caption(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(turns("<image> and <image>", "Two."), tokenizer, "plain", 2)
    caption = tokenizer.encode("Two.\n")
    assert encoded.tokens == [1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID, *caption]
    assert encoded.labels == [IGNORE_INDEX] * 3 + caption


def test_an_image_in_an_answer_does_not_train(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(turns("Draw.", "<image>\nHere."), tokenizer, "vicuna_v1", 1)
    at = encoded.tokens.index(IMAGE_TOKEN_ID)
    assert encoded.labels[at] == IGNORE_INDEX
    assert encoded.labels[at + 1] != IGNORE_INDEX


@pytest.mark.parametrize("template", ["plain", "vicuna_v1"])
@pytest.mark.parametrize(
    ("conversation", "num_images", "reason"),
    [
        (None, 0, "no_conversation"),
        ([], 0, "no_conversation"),
        ("text", 0, "no_conversation"),
        (["text", "text"], 0, "no_conversation"),
        ([{"from": "tool", "value": "x"}, {"from": "gpt", "value": "y"}], 0, "unknown_role"),
        ([{"from": "system", "value": "<image>"}, *turns("x", "y")], 1, "image_in_system"),
        ([{"value": "x"}, {"from": "gpt", "value": "y"}], 0, "unknown_role"),
        ([{"from": ["human"], "value": "x"}, {"from": "gpt", "value": "y"}], 0, "unknown_role"),
        (turns("<image>", 7), 1, "value_not_text"),
        (turns("<image>", None), 1, "value_not_text"),
        (turns(["<image>"], "x"), 1, "value_not_text"),
        (turns("<image>", "half \ud83d pair"), 1, "text_not_unicode"),
        ([{"from": "human", "value": "<image>"}] * 2, 1, "role_order"),
        (turns("no placeholder", "x"), 1, "image_without_placeholder"),
        (turns("<image>", "x"), 0, "placeholder_without_image"),
        (turns("<image><image>", "x"), 1, "image_count"),
        (turns("<image>", "x"), 2, "image_count"),
    ],
)
def test_conversations_that_cannot_be_used(
    tokenizer: Tokenizer, conversation: Any, num_images: int, reason: str, template: str
) -> None:
    with pytest.raises(ConversationError) as error:
        encode_conversation(conversation, tokenizer, template, num_images)
    assert error.value.reason == reason
    assert str(error.value).startswith(f"{reason}: ")


def test_a_system_turn_takes_the_place_of_the_published_prompt(tokenizer: Tokenizer) -> None:
    said = turns("<image>\nWhat is it?", "A cat.")
    own = encode_conversation([{"from": "system", "value": "Be brief."}, *said], tokenizer, "vicuna_v1", 1)
    usual = encode_conversation(said, tokenizer, "vicuna_v1", 1)
    begin = encode_prompt("<image>\nWhat is it?", tokenizer, "vicuna_v1", 1, system="Be brief.")
    assert own.tokens[: len(begin)] == begin
    assert trained(own, tokenizer) == trained(usual, tokenizer) == "A cat.|"
    for blank in ("", " \n"):
        assert (
            encode_conversation([{"from": "system", "value": blank}, *said], tokenizer, "vicuna_v1", 1)
            == usual
        )
    only = [{"from": "system", "value": "Be brief."}]
    with pytest.raises(ConversationError, match="no_conversation"):
        encode_conversation(only, tokenizer, "vicuna_v1", 0)


def test_plain_has_no_system_prompt(tokenizer: Tokenizer) -> None:
    said = turns("<image>", "A cat.")
    with_system = [{"from": "system", "value": "Be brief."}, *said]
    assert encode_conversation(with_system, tokenizer, "plain", 1) == encode_conversation(
        said, tokenizer, "plain", 1
    )


def test_order_of_roles(tokenizer: Tokenizer) -> None:
    def reason(template: str, *roles: str) -> str:
        conversation = [{"from": role, "value": "x"} for role in roles]
        with pytest.raises(ConversationError) as error:
            encode_conversation(conversation, tokenizer, template, 0)
        return error.value.reason

    assert reason("vicuna_v1", "human", "human", "gpt") == "role_order"
    assert reason("vicuna_v1", "human", "gpt", "system", "human") == "role_order"
    assert reason("vicuna_v1", "system", "system", "human", "gpt") == "role_order"
    assert reason("vicuna_v1", "human", "gpt", "gpt") == "role_order"
    assert reason("vicuna_v1", "gpt", "gpt", "human") == "role_order"
    assert reason("vicuna_v1", "gpt") == "no_conversation"
    assert reason("plain", "gpt", "human") == "role_order"
    assert reason("plain", "human") == "plain_turns"


def test_plain_refuses_an_image_in_the_caption(tokenizer: Tokenizer) -> None:
    with pytest.raises(ConversationError, match="image_in_caption"):
        encode_conversation(turns("Look:", "<image> a car"), tokenizer, "plain", 1)


def test_an_unknown_template_is_a_mistake_of_the_caller(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r"unknown template 'v0'.*plain, vicuna_v1"):
        encode_conversation(turns("x", "y"), tokenizer, "v0", 0)
    with pytest.raises(ValueError, match="unknown template"):
        encode_prompt("x", tokenizer, "v0", 0)


def test_a_question_at_the_end_is_kept_and_does_not_train(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(turns("A?", "B.", "C?"), tokenizer, "vicuna_v1", 0)
    assert trained(encoded, tokenizer) == "B.|"
    assert encode_conversation(turns("A?"), tokenizer, "vicuna_v1", 0).num_labels == 0


def test_prompts_for_generation(tokenizer: Tokenizer) -> None:
    assert encode_prompt("ignored", tokenizer, "plain", 2) == [1, IMAGE_TOKEN_ID, IMAGE_TOKEN_ID]
    two = encode_prompt("Compare.", tokenizer, "vicuna_v1", 2)
    assert two == encode_prompt("<image>\n<image>\nCompare.", tokenizer, "vicuna_v1", 2)
    assert two.count(IMAGE_TOKEN_ID) == 2
    with pytest.raises(ConversationError, match="image_count"):
        encode_prompt("<image> a <image> b", tokenizer, "vicuna_v1", 1)


def test_a_prompt_is_the_beginning_of_its_training_sample(tokenizer: Tokenizer) -> None:
    encoded = encode_conversation(turns("<image>\nWhat is it?", "A cat."), tokenizer, "vicuna_v1", 1)
    prompt = encode_prompt("What is it?", tokenizer, "vicuna_v1", 1)
    first_label = next(at for at, label in enumerate(encoded.labels) if label != IGNORE_INDEX)
    assert encoded.tokens[:first_label] == prompt


def test_a_follow_up_is_the_beginning_of_its_training_sample(tokenizer: Tokenizer) -> None:
    said = turns("<image>\nWhat is it?", "A cat.", "Where?", "", "And why?", "Because.")
    encoded = encode_conversation(said, tokenizer, "vicuna_v1", 1)
    earlier = [("What is it?", "A cat."), ("Where?", "")]
    prompt = encode_prompt("And why?", tokenizer, "vicuna_v1", 1, earlier)
    answer = len(tokenizer.encode("Because.")) + 1  # and </s>
    assert encoded.tokens[:-answer] == prompt
    # An image may stand in a later question, and no answer may bring one of its own.
    later = encode_prompt("See <image>", tokenizer, "vicuna_v1", 1, [("Hi.", "Hello.")])
    assert later.count(IMAGE_TOKEN_ID) == 1 and later.index(IMAGE_TOKEN_ID) > len(
        tokenizer.encode("Hi. Hello.")
    )
    for images in (0, 1):
        with pytest.raises(ConversationError, match="image_in_answer"):
            encode_prompt("Why?", tokenizer, "vicuna_v1", images, [("What?", "An <image>.")])


def test_cutting_counts_an_image_as_one_and_the_first_label_is_never_predicted() -> None:
    encoded = Encoded([1, IMAGE_TOKEN_ID, 7, 8, IMAGE_TOKEN_ID, 9], [1, -100, 7, -100, -100, 9])
    assert (encoded.num_images, encoded.num_labels) == (2, 2)
    cut = encoded.cut(4)
    assert (cut.tokens, cut.labels) == ([1, IMAGE_TOKEN_ID, 7, 8], [1, -100, 7, -100])
    assert (cut.num_images, cut.num_labels) == (1, 1)
    assert encoded.cut(100) == encoded


TEXT = st.text(alphabet=st.sampled_from("ab .:é猫\n") | st.characters(codec="utf-8"), max_size=30)


@given(st.lists(TEXT, min_size=2, max_size=6))
@example(["", "<image>"])  # Hypothesis draws the strings of the code, too
@example(["Q?", " \u200b"])
def test_tokens_are_those_of_the_text_and_labels_those_of_the_answers(texts: list[str]) -> None:
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    if any("<image>" in text for text in texts):
        with pytest.raises(ConversationError, match="placeholder_without_image"):
            encode_conversation(turns(*texts), tokenizer, "vicuna_v1", 0)
        return
    assume(not any(piece in text for text in texts for piece in ("<s>", "</s>", "<unk>", "<video>")))
    texts = [text if number % 2 == 0 or not is_blank(text) else "" for number, text in enumerate(texts)]
    encoded = encode_conversation(turns(*texts), tokenizer, "vicuna_v1", 0)
    prompt = encode_prompt("@", tokenizer, "vicuna_v1", 0)
    text = tokenizer.decode(prompt).split("USER:")[0]
    for number, turn in enumerate(texts):
        role = ("USER", "ASSISTANT")[number % 2]
        end = ("</s>", " ")[number % 2 == 0]
        text += f"{role}: {turn}{end}" if turn else f"{role}:"
    assert encoded.tokens == tokenizer.encode(text, bos=True)
    for token, label in zip(encoded.tokens, encoded.labels, strict=True):
        assert label in (token, IGNORE_INDEX)
    expected = "".join(f"{answer}|" for answer in texts[1::2] if answer)
    assert trained(encoded, tokenizer) == expected.replace("▁", " ")


# What rows of other people's data hold: any text, placeholders anywhere, any order of roles, things that are no turn.
ANY_TEXT = st.lists(TEXT | st.sampled_from(["<image>", "<image>\n", "</s>", "\ud800"]), max_size=4).map(
    "".join
)
ANY_TURN = st.fixed_dictionaries(
    {
        "from": st.sampled_from(["human", "gpt", "human", "gpt", "system", "", None]),
        "value": ANY_TEXT | st.none(),
    }
)


@settings(max_examples=500)
@given(
    conversation=st.lists(ANY_TURN | st.just("no turn"), max_size=6),
    num_images=st.integers(0, 3),
    template=st.sampled_from(["plain", "vicuna_v1"]),
)
def test_any_conversation_is_encoded_or_refused_with_a_reason(
    conversation: list[Any], num_images: int, template: str
) -> None:
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    try:
        encoded = encode_conversation(conversation, tokenizer, template, num_images)
    except ConversationError as error:
        assert str(error).startswith(f"{error.reason}: ")
        return
    conversation = conversation[conversation[0]["from"] == "system" :]
    roles = [turn["from"] for turn in conversation]
    answers = [turn["value"] for turn in conversation[roles[0] == "gpt" :] if turn["from"] == "gpt"]
    expected = ["human", "gpt"] * len(roles)
    assert roles[roles[0] == "gpt" :] == expected[: len(roles) - (roles[0] == "gpt")]
    assert encoded.num_images == num_images
    assert encoded.tokens[0] == tokenizer.bos_id
    assert len(encoded.labels) == len(encoded.tokens)
    for token, label in zip(encoded.tokens, encoded.labels, strict=True):
        assert label == IGNORE_INDEX or (label == token and token != IMAGE_TOKEN_ID)
        assert token == IMAGE_TOKEN_ID or 0 <= token < tokenizer.vocab_size
    if not any(answers):
        assert encoded.num_labels == 0


@settings(max_examples=200)
@given(
    roles=st.lists(st.sampled_from(["human", "gpt"]), min_size=1, max_size=6),
)
def test_roles_in_turns_are_taken_and_no_others(roles: list[str]) -> None:
    tokenizer = Tokenizer(find_golden("tokenize") / "tokenizer.model")
    left = roles[1:] if roles[0] == "gpt" else roles
    taken = bool(left) and left == (["human", "gpt"] * len(left))[: len(left)]
    try:
        encode_conversation([{"from": role, "value": "x"} for role in roles], tokenizer, "vicuna_v1", 0)
    except ConversationError as error:
        assert not taken and error.reason == ("role_order" if left else "no_conversation")
    else:
        assert taken
