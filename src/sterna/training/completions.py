"""Prompts and completions as tokens: one row an example, whose loss is the completion's alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sterna.training.chats import rendered
from sterna.training.data import Examples


@dataclass(frozen=True, slots=True)
class Completion:
    """Token ids of a prompt, and of what is to follow it with the end of text. The prompt's first `kept`, its beginning of text, are never cut."""

    prompt: list[int]
    completion: list[int]
    kept: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)

    def prompt_within(self, room: int) -> list[int]:
        """The prompt's end, and its beginning of text, in at most `room` tokens (1 or more)."""
        if len(self.prompt) <= room:
            return self.prompt
        kept = self.prompt[: min(self.kept, room)]
        return [*kept, *self.prompt[len(self.prompt) - (room - len(kept)) :]]

    def within(self, limit: int) -> Completion:
        """At most `limit` tokens (2 or more): the prompt is cut from the left, and a completion that alone is too long from the right.

        One token of the prompt always stays, so that each token of the completion is predicted from something.
        """
        if len(self) <= limit:
            return self
        completion = self.completion[: limit - min(1, len(self.prompt))]
        return Completion(self.prompt_within(limit - len(completion)) if self.prompt else [], completion, self.kept)


def joined(prompt: str, completion: str) -> tuple[str, str]:
    """Both as they are, where one of them has white space at the seam; else the completion begins with a space."""
    return prompt, completion if prompt[-1:].isspace() or completion[:1].isspace() else f" {completion}"


def completions(tokenizer: Any, examples: Examples) -> list[Completion]:
    """The tokens of each example's prompt and completion, uncut. Raises InvalidArgument for chats that cannot be rendered.

    The ids are those of the whole text, cut where the prompt's own ids end: this is what TRL's SFTTrainer trains. Where they do not begin with the
    prompt's (a tokenizer that takes a space and the word after it as one), TRL masks a wrong token or part; here the white space at the prompt's end
    goes to the completion, as in lm-evaluation-harness. Where that does not help either, both are tokenized apart. So generation always starts from
    ids that training saw.
    """
    before, after = _specials(tokenizer)
    if examples.chats is not None:
        pairs = [rendered(tokenizer, chat) for chat in examples.chats]  # with what stands before and after, as the template has it
    else:
        pairs = [joined(prompt, str(answer)) for prompt, answer in zip(examples.texts, examples.answers or (), strict=True)]
    prompts, wholes = (_ids(tokenizer, texts) for texts in ([prompt for prompt, _ in pairs], [prompt + completion for prompt, completion in pairs]))
    found = []
    for pair, prompt, whole in zip(pairs, prompts, wholes, strict=True):
        first, second = _parted(tokenizer, pair, prompt, whole)
        if examples.chats is None:  # a text may bring its own
            first = first if first[: len(before)] == before else [*before, *first]
            second = second if second[-len(after) :] == after else [*second, *after]
        found.append(Completion(first, second, len(before) if first[: len(before)] == before else 0))
    return found


def _parted(tokenizer: Any, pair: tuple[str, str], prompt: list[int], whole: list[int]) -> tuple[list[int], list[int]]:
    if whole[: len(prompt)] == prompt and len(whole) > len(prompt):
        return prompt, whole[len(prompt) :]
    shorter = _ids(tokenizer, [pair[0].rstrip()])[0]
    if shorter and whole[: len(shorter)] == shorter and len(whole) > len(shorter):
        return shorter, whole[len(shorter) :]
    return prompt, _ids(tokenizer, [pair[1]])[0]


def _ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    ids: list[list[int]] = tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _specials(tokenizer: Any) -> tuple[list[int], list[int]]:
    """What stands before a text, as the tokenizer has it, and after it: the end of text, or what the tokenizer has there where it has none."""
    plain, full = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
    place = next((i for i in range(len(full)) if plain and full[i : i + len(plain)] == plain), 0)
    end = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else full[place + len(plain) :]
    return full[:place], end
