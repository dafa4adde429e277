"""A trained model in this process that answers conversations under a condition."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils.logging import disable_progress_bar

from ochat.backend import local_device
from ochat.checkpoint import EXPORT_NAME, CheckpointCard
from ochat.data.conversation import Conversation, Message
from ochat.data.tokenize import ChatTokenizer, load_tokenizer
from ochat.errors import CheckpointError, OchatError


@dataclass(frozen=True, slots=True, kw_only=True)
class Sampling:
    """temperature 0 is greedy. max_new_tokens: per answer."""

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class Chat:
    """`load_chat(folder).reply([Message(role="user", content="Hi")], condition="GPT4")`"""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, card: CheckpointCard) -> None:
        self.card = card
        self._model = model
        self._tokenizer = tokenizer
        self._chat_tokenizer = ChatTokenizer(tokenizer, card.inference_template())

    def reply(self, messages: Sequence[Message], *, condition: str = "", sampling: Sampling | None = None) -> str:
        """The assistant's answer; an empty condition is the model's default one."""
        conversation = Conversation(messages=tuple(messages), condition=condition.strip())
        return self.reply_batch([conversation], sampling=sampling)[0]

    def reply_batch(self, conversations: Sequence[Conversation], *, sampling: Sampling | None = None) -> list[str]:
        """An answer to each conversation, generated together."""
        sampling = sampling or Sampling()
        prompts = [self._chat_tokenizer.prompt_ids(conversation) for conversation in conversations]
        longest = max(map(len, prompts))
        if longest >= self.card.max_length:
            raise OchatError(
                f"the conversation has {longest} tokens, the model's limit is {self.card.max_length}. Start a new one."
            )
        end_of_turn = self._chat_tokenizer.end_of_turn_ids[-1]
        input_ids = torch.full((len(prompts), longest), end_of_turn)
        attention_mask = torch.zeros_like(input_ids)
        for row, prompt in enumerate(prompts):  # padded on the left: answers begin in the same column
            input_ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            attention_mask[row, longest - len(prompt) :] = 1
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        torch.manual_seed(sampling.seed)
        with torch.inference_mode():
            output = self._model.generate(
                input_ids=input_ids.to(self._model.device),
                attention_mask=attention_mask.to(self._model.device),
                max_new_tokens=min(sampling.max_new_tokens, self.card.max_length - longest),
                eos_token_id=end_of_turn,
                pad_token_id=end_of_turn,
                **(drawn if sampling.temperature > 0 else {"do_sample": False}),
            )
        answers = output[:, longest:].tolist()
        return [self._tokenizer.decode(answer, skip_special_tokens=True).strip() for answer in answers]


def load_chat(checkpoint: str | Path) -> Chat:
    """Load an exported folder, or the export of a run folder."""
    folder = Path(checkpoint)
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give a run folder or its export, such as runs/NAME/export.")
    if (folder / EXPORT_NAME).is_dir():
        folder = folder / EXPORT_NAME
    disable_progress_bar()  # transformers draws one for every load
    card = CheckpointCard.read(folder)
    tokenizer = load_tokenizer(str(folder), card.inference_template())
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(local_device()).eval()
    return Chat(model, tokenizer, card)
