"""The tokenizer of builtin://fable: byte-level BPE, ChatML, and the chat frames the model sees in training.

Owns token ids, the chat template and the tokenizer files. Knows no model and does not choose the text.
"""

import json
import random
import re
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

END_OF_TEXT, IM_START, IM_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
SPECIAL_TOKENS = (END_OF_TEXT, IM_START, IM_END)  # ids 0, 1, 2
VOCAB_SIZE = 4096

# Qwen2's split. No normalizer on purpose: what is encoded must decode to the same bytes.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% elif message['content'] %}"
    "{% for part in message['content'] %}{{ part['text'] if part['type'] == 'text' else '' }}{% endfor %}"
    "{% endif %}"
    "{{ '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# How people may ask this model for prose; {} is the opening of a passage.
OPENED_PROMPTS = ("{}", "{}", "Continue: {}", "Continue this story: {}", "What happens next? {}", "Go on. {}")
OPEN_PROMPTS = ("Tell me a story.", "Tell me a tale", "Hello!", "Hello", "Hi", "Write something.", "What is your name?")
SYSTEM_PROMPTS = ("You are a storyteller.", "You are a helpful assistant.")
SENTENCE_END = re.compile(r"(?<=[.!?]) +(?=[A-Z\"])")


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE of VOCAB_SIZE tokens, special tokens and all 256 bytes included."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, max_length: int) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    config = {
        "add_prefix_space": False,
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": IM_END,
        "model_max_length": max_length,
        "pad_token": END_OF_TEXT,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def chat_frame(document: str, rng: random.Random) -> str:
    """One exchange made from a random passage: the user opens it or asks for it, the assistant tells it and stops."""
    paragraphs = document.split("\n\n")
    start = rng.randrange(len(paragraphs))
    sentences = SENTENCE_END.split(paragraphs[start])
    num_opening = rng.randint(1, 3)
    if len(sentences) <= num_opening or rng.random() < 0.2:
        user, answer = rng.choice(OPEN_PROMPTS), paragraphs[start]
    else:
        user = rng.choice(OPENED_PROMPTS).format(" ".join(sentences[:num_opening]))
        answer = " ".join(sentences[num_opening:])
    for paragraph in paragraphs[start + 1 : start + 1 + rng.randint(0, 3)]:
        answer += "\n\n" + paragraph
    if len(answer) > 1200:
        answer = answer[:1200].rsplit(". ", 1)[0] + "."
    system = _message("system", rng.choice(SYSTEM_PROMPTS)) if rng.random() < 0.25 else ""
    return system + _message("user", user) + _message("assistant", answer)


def _message(role: str, content: str) -> str:
    return f"{IM_START}{role}\n{content}{IM_END}\n"
