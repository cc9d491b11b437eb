"""Cases of the answer processor of VQA, and the changes of its rules that they have to notice."""

from __future__ import annotations

from tests.evaluation.case import Case, Mutation

MADE = [
    ("Two.", "2"), ("The dog's tail", "dog 's tail"), ("dont", "don't"), ("none", "0"), ("1,000", "1000"),
    ("1,000-2,000", "1000 2000"), ("a.b", "ab"), (".5", ".5"), ("3.5", "3.5"), ("5.", "5"), ("yes/no", "yes no"),
    ("t-shirt", "t shirt"), ("What's up?", "what 's up"), ("No!", "no"),
    # each mark of punctuation, between letters, and beside a space, which drops it everywhere
    *((f"x{mark}y", "x y") for mark in ";/[]\"{}()=+\\_-><@`!"),
    *((f"x{mark}y{mark} z", "xy z") for mark in ";/[]\"{}()=+\\_-><@`!"),
    ("x -y-z", "x yz"), ("x/-y-z", "x y z"), ("DOG'S", "dog 's"), ("a cat", "cat"), ("x:y", "x:y"),
    ("x,y?z", "xyz"), ("an apple, the tree", "apple tree"),
    ("YES", "yes"), ("\tzero\nten ", "0 10"), ("eleven", "eleven"), ("", ""), ("<=.", ""),
    ("x" + "." * 34, "x.."), ("wouldnt've", "wouldn't've"), ("wouldn'tve", "wouldn't've"),
    ("somebody'd", "somebodyd"), ("twas", "'twas"), ("id", "id"), ("yall'd've", "y'all'd've"),
]  # fmt: skip
CASES: list[Case] = [
    Case("answer_processor", f"process {text!r}", lambda m, text=text: m.process_answer(text), expected)
    for text, expected in MADE
]
TOOL = [
    ("1,000-2,000", "10002000"),
    ("Yes?", "yes"),
    ("x,y", "x y"),
    ("x, y,z", "x yz"),
    ("The dog's", "dog's"),
]
CASES += [
    Case("answer_processor", f"tool {text!r}", lambda m, text=text: m.process_as_vqa_tool(text), expected)
    for text, expected in TOOL
]


MUTATIONS = [
    Mutation("answer_processor", "case stays", "text = text.lower().replace", "text = text.replace"),
    Mutation("answer_processor", "commas stay in the first step", '.replace(",", "")', ""),
    Mutation("answer_processor", "question marks stay in the first step", '.replace("?", "")', ""),
    Mutation("answer_processor", "'s is not set apart", '.replace("\'s", " \'s")', ""),
    Mutation("answer_processor", "line ends stay", 'text.replace("\\n", " ")', 'text.replace("\\n", "")'),
    Mutation("answer_processor", "punctuation always spaced out", '"" if drop else " "', '" "'),
    Mutation("answer_processor", "punctuation always dropped", '"" if drop else " "', '""'),
    Mutation("answer_processor", "only a space behind a mark drops it", ' or f" {mark}" in text', ""),
    Mutation("answer_processor", "only a space before a mark drops it", 'f"{mark} " in text or ', ""),
    Mutation("answer_processor", "digit-comma-digit does not drop", "drop = drop_all or ", "drop = "),
    Mutation(
        "answer_processor",
        "judged on what earlier marks left",
        'f"{mark} " in text or f" {mark}" in text',
        'f"{mark} " in result or f" {mark}" in result',
    ),
    Mutation("answer_processor", "a comma alone drops", r'"\d,\d"', r'","'),
    Mutation("answer_processor", "the hyphen is no punctuation", "_-><", "_><"),
    Mutation("answer_processor", "the exclamation mark is no punctuation", ",?!", ",?"),
    Mutation("answer_processor", "the colon is punctuation", "`,?!", "`,?!:"),
    Mutation("answer_processor", "every full stop is dropped", r"\.(?!\d)", r"\."),
    Mutation("answer_processor", "a full stop behind a digit stays", r"\.(?!\d)", r"(?<!\d)\.(?!\d)"),
    Mutation(
        "answer_processor",
        "any number of full stops is dropped",
        "_MOST_FULL_STOPS = 32",
        "_MOST_FULL_STOPS = 0",
    ),
    Mutation("answer_processor", "none is no number", '{"none": "0"}', "{}"),
    Mutation("answer_processor", "numbers end at nine", ', "ten")', ")"),
    Mutation(
        "answer_processor", "numbers begin at one", "enumerate(_NUMBERS)", "enumerate(_NUMBERS, start=1)"
    ),
    Mutation("answer_processor", "the stays", '"an", "the"', '"an"'),
    Mutation("answer_processor", "an stays", '"an", "the"', '"the"'),
    Mutation("answer_processor", "a stays", '{"a", "an"', '{"an"'),
    Mutation("answer_processor", "no contractions", "CONTRACTIONS.get(word, word)", "word"),
    Mutation(
        "answer_processor",
        "only the first apostrophe may be missing",
        "in enumerate(word) if",
        "in enumerate(word[:3]) if",
    ),
    Mutation("answer_processor", "somebody'd keeps its apostrophe", " | _ODD_CONTRACTION\n", "\n"),
]
