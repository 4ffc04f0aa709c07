"""Decontamination against dev and test."""

import json
from pathlib import Path

import pytest

from delia.curate.overlap import HeldOut, digest_prompts, read_eval_rows
from delia.schema import Message, Row, SeedTask
from delia.store.tasks import TaskConfig

TEN = "zero one two three four five six seven eight nine"
SYSTEM = "you are a very kind and patient helper of all people"


def make_row(instruction: str, *, system: str = "", answer: str = "yes") -> Row:
    turns = [("system", system), ("user", instruction), ("assistant", answer)]
    messages = tuple(Message(role=role, content=text) for role, text in turns if text)
    return Row(row_id="r0", index=0, source="s", messages=messages)


def make_seed(user: str, *, system: str = "", answer: str = "the reference") -> SeedTask:
    return SeedTask(task_id="t0", messages=make_row(user, system=system, answer=answer).messages)


@pytest.mark.parametrize(
    ("instruction", "is_overlap"),
    [
        (TEN, True),
        (TEN.upper().replace(" ", "  "), True),
        ("zero one two three four five six seven", True),
        ("and now two three four five six seven eight nine end", True),
        ("zero one two three four five six SEVEN", True),
        ("zero one two three four five six", False),
        ("one two three four five six seven nine eight", False),
        ("what else ?", False),
    ],
)
def test_sharing_8_words_in_a_row_with_an_eval_prompt_is_an_overlap(instruction: str, is_overlap: bool):  # noqa: FBT001
    assert HeldOut([make_seed(TEN)]).overlaps(make_row(instruction)) is is_overlap


@pytest.mark.parametrize(
    ("instruction", "is_overlap"),
    [
        ("what is two and two ?", True),
        (" What is TWO and two ? ", True),
        ("tell me what is two and two ?", False),
    ],
)
def test_a_text_shorter_than_the_ngram_overlaps_only_where_it_is_equal(instruction: str, is_overlap: bool):  # noqa: FBT001
    assert HeldOut([make_seed("what is two and two ?")]).overlaps(make_row(instruction)) is is_overlap


@pytest.mark.parametrize("place", [0, 1, 2])
def test_a_short_eval_prompt_is_found_in_any_user_turn_and_in_no_answer(place: int):
    turns = ["hello there", "what else ?", "thank you"]
    turns[place] = "What is two and two ?"
    answers = ["hi", "nothing", "you are welcome"]
    pairs = [
        (Message(role="user", content=turn), Message(role="assistant", content=answer))
        for turn, answer in zip(turns, answers, strict=True)
    ]
    row = Row(row_id="r0", index=0, source="s", messages=tuple(turn for pair in pairs for turn in pair))

    assert HeldOut([make_seed("what is two and two ?")]).overlaps(row)
    assert HeldOut([make_seed("what is two and two ?", system=SYSTEM)]).overlaps(row)
    assert not HeldOut([make_seed("what is two and three ?"), make_seed("nothing")]).overlaps(row)


def test_system_turns_hide_no_overlap_and_make_none():
    held_out = HeldOut([make_seed("what is two and two ?", system=SYSTEM)])

    assert held_out.overlaps(make_row("what is two and two ?"))
    assert held_out.overlaps(make_row("what is two and two ?", system="be brief"))
    assert held_out.overlaps(make_row("what is two and two ?", system=SYSTEM))
    assert held_out.overlaps(make_row(f"{SYSTEM} what is two and two ?"))
    assert not held_out.overlaps(make_row("name a cat", system=SYSTEM))
    assert HeldOut([make_seed("be brief name a cat")]).overlaps(make_row("name a cat", system="be brief"))


def test_an_eval_prompt_in_a_system_turn_of_the_row_is_an_overlap():
    assert HeldOut([make_seed(TEN)]).overlaps(make_row("go on", system=TEN))


def test_answers_count_on_neither_side():
    held_out = HeldOut([make_seed("name a cat", answer=TEN)])

    assert not held_out.overlaps(make_row(TEN))
    assert not HeldOut([make_seed(TEN)]).overlaps(make_row("name a cat", answer=TEN))


def test_a_row_without_reference_is_held_out_whole():
    seed = SeedTask(task_id="t0", messages=(Message(role="user", content=TEN),))

    assert HeldOut([seed]).overlaps(make_row(TEN))


def test_what_train_says_too_is_no_overlap_unless_the_whole_prompt_is_there():
    template = "please put the following into klingon and nothing else :"
    held_out = HeldOut([make_seed(f"{template} a cat")], train_rows=[make_seed(f"{template} a dog")])

    assert HeldOut([make_seed(f"{template} a cat")]).overlaps(make_row(f"{template} my car"))
    assert not held_out.overlaps(make_row(f"{template} my car"))
    assert held_out.overlaps(make_row(f"{template} a cat"))


def test_what_train_says_in_a_system_turn_counts_as_said_in_train():
    template = "please put the following into klingon and nothing else :"
    train = make_seed("a dog", system=template)
    held_out = HeldOut([make_seed(f"{template} a cat")], train_rows=[train])

    assert not held_out.overlaps(make_row(f"{template} my car"))


def test_a_whole_prompt_inside_a_longer_text_is_an_overlap_though_train_holds_its_ngrams():
    held_out = HeldOut([make_seed(TEN)], train_rows=[make_seed(f"{TEN} ten")])

    assert held_out.overlaps(make_row(f"so {TEN} ?"))
    assert not held_out.overlaps(make_row(f"so {TEN.removesuffix(' nine')} ?"))
    assert not held_out.overlaps(make_row(f"so {TEN}teen ?"))


@pytest.mark.parametrize(("ngram", "is_overlap"), [(2, True), (3, True), (4, False), (None, False)])
def test_the_length_of_the_ngram_is_a_setting_and_none_compares_whole_texts(
    ngram: int | None, is_overlap: bool  # noqa: FBT001
):  # fmt: skip
    held_out = HeldOut([make_seed(TEN)], ngram=ngram)

    assert held_out.overlaps(make_row("say one two three")) is is_overlap
    assert held_out.overlaps(make_row(TEN))


def test_nothing_overlaps_where_nothing_is_held_out():
    assert not HeldOut([]).overlaps(make_row(""))
    assert not HeldOut([make_seed("", system="")]).overlaps(make_row("", answer="x"))


# ---- sets beside the task's own


def write_split(folder: Path, split: str, *prompts: str, answer: str = "yes") -> None:
    rows = [json.dumps({"prompt": text, "completion": answer}) for text in prompts]
    (folder / f"{split}.jsonl").write_text("\n".join(rows))


def read_prompts(*paths: Path) -> list[str]:
    rows = read_eval_rows([TaskConfig(path=str(path)) for path in paths])
    return [row.prompt[-1].content for row in rows]


def test_of_a_set_dev_and_test_are_read_and_all_rows_where_it_has_neither(tmp_path):
    (tmp_path / "task.yaml").write_text("name: x")
    write_split(tmp_path, "train", "a", "b")
    assert read_prompts(tmp_path) == ["a", "b"]
    assert read_prompts(tmp_path, tmp_path / "train.jsonl") == ["a", "b", "a", "b"]

    write_split(tmp_path, "test", "d")
    assert read_prompts(tmp_path) == ["d"]
    write_split(tmp_path, "dev", "c")
    assert read_prompts(tmp_path) == ["c", "d"]


def test_the_digest_of_prompts_changes_with_them_and_with_nothing_else():
    rows = [make_seed("a"), make_seed("b")]
    digest = digest_prompts(rows)

    assert digest_prompts([make_seed("b", answer="no"), make_seed("a"), make_seed("a")]) == digest
    assert digest_prompts([make_seed("a"), make_seed("c")]) != digest
    assert digest_prompts([make_seed("a", system="x"), make_seed("b")]) != digest
