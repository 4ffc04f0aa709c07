"""Answers that open by declining, and others that begin alike."""

import pytest

from delia.curate.refusals import opens_with_refusal


@pytest.mark.parametrize(
    "answer",
    [
        "I'm sorry, but I can't help with that.",
        "I’m sorry, but I can’t assist with that request.",
        "  I AM SORRY,\n but I cannot do that.",
        "Sorry, I am unable to provide medical advice.",
        "I apologize, but I'm not able to write that.",
        "I sincerely apologise, but we cannot continue.",
        "Unfortunately, I do not have access to the internet.",
        "I'm afraid I can't do that, Dave.",
        "As an AI language model, I don't have personal opinions.",
        "As a large language model I cannot feel pain.",
        "I am an AI and can't see pictures.",
        "I cannot provide instructions for that.",
        "I really can't recommend this.",
        "I won't help you hurt anyone.",
        "I'm unable to browse the web.",
        "I must apologize, but I have to decline.",
    ],
)
def test_an_answer_that_opens_by_declining_is_a_refusal(answer: str):
    assert opens_with_refusal(answer)


@pytest.mark.parametrize(
    "answer",
    [
        "",
        "I'm sorry to hear that. You cannot change what happened.",
        "Sorry seems to be the hardest word.",
        "I cannot forget that night in the woods.",
        "As an AI researcher, she builds models that can't lie.",
        "As a child I was unable to swim.",
        "Unfortunately, the ship sank in 1912.",
        "Unfortunately , sales fell. I cannot say why.",
        "The bot said: I'm sorry, but I can't help with that.",
        "I can help with that.",
        "I would not recommend this hotel.",
        "red",
    ],
)
def test_an_answer_of_another_kind_is_none(answer: str):
    assert not opens_with_refusal(answer)
