"""How a question is put to the model, by name: published code bases differ here, and it moves their numbers."""

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class PromptStyle:
    """Templates, {} standing for the question. The target follows after one space.

    edit: the edit's own prompt and its rephrasing. picture: other questions about a picture (M-Loc, portability).
    text: questions without a picture (T-Loc).
    """

    name: str
    edit: str = "{}"
    picture: str = "{}"
    text: str = "{}"

    def __post_init__(self) -> None:
        for template in (self.edit, self.picture, self.text):
            if template.count("{}") != 1:
                raise ValueError(f"a prompt template needs {{}} once, for the question, but is {template!r}")

    def ask(self, question: str) -> str:
        """The full prompt of an edit or its rephrasing."""
        return self.edit.replace("{}", question)

    def ask_picture(self, question: str) -> str:
        """The full prompt of another question about a picture."""
        return self.picture.replace("{}", question)

    def ask_text(self, question: str) -> str:
        """The full prompt of a question without a picture."""
        return self.text.replace("{}", question)


SHORT = "Question: {} Short answer:"

STYLES = {
    s.name: s
    for s in (
        PromptStyle("raw"),  # UniKE's `edit_dataset`, VLKEB, EasyEdit since 2025-11: the question alone
        PromptStyle("short-answer", SHORT, SHORT),  # MMEdit's E-VQA; the trained baselines' evaluator
        PromptStyle("caption", "{}", SHORT),  # MMEdit's E-IC: the caption's opening alone, M-Loc as in E-VQA
        PromptStyle("answer", "Question: {} Answer:", "Question: {} Answer:"),  # BLIP-2's own for questions
        PromptStyle("answer-is", "{} The answer is:", "{} The answer is:", "{} The answer is:"),  # LiveEdit, VisEdit
    )
}
OF_TASK = {"vqa": "short-answer", "caption": "caption"}  # MMEdit's own: what "auto" means


def prompt_style(name: str, task: str, processor: Any = None) -> PromptStyle:
    """The style called `name` for a task ("vqa" or "caption").

    name: one of STYLES; a template with {}, for every question about a picture; "chat" (the processor's chat template);
    or "auto": chat where the processor has such a template and leaves it to the prompt to hold the picture's token (a
    BLIP-2's puts the tokens itself), otherwise MMEdit's own. ValueError for anything else.
    """
    check_style(name)
    if "{}" in name:
        return PromptStyle("template", name, name)
    if name == "auto":
        own = getattr(processor, "num_query_tokens", None) is None
        name = "chat" if own and getattr(processor, "chat_template", None) else OF_TASK[task]
    if name == "chat":
        return chat_style(processor)
    return STYLES[name]


def check_style(name: str) -> None:
    """ValueError for a name that is no style, whatever the processor is."""
    if "{}" in name:
        PromptStyle("template", name, name)
    elif name not in ("auto", "chat", *STYLES):
        known = ", ".join(["auto", "chat", *STYLES])
        raise ValueError(f"the prompt style is {name!r}, not one of {known}, or a template with {{}} for the question")


def chat_style(processor: Any) -> PromptStyle:
    """The processor's own chat template, with and without a picture; ValueError where it has none."""
    if not getattr(processor, "chat_template", None):
        raise ValueError(f"{type(processor).__name__} has no chat template: choose another prompt style")

    def templated(*parts: dict[str, str]) -> str:
        said = [{"role": "user", "content": [*parts, {"type": "text", "text": "{}"}]}]
        return str(processor.apply_chat_template(said, add_generation_prompt=True, tokenize=False))

    shown = templated({"type": "image"})
    return PromptStyle("chat", shown, shown, templated())
