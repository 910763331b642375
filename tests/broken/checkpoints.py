"""Ways to break a checkpoint, each named after what is wrong afterwards; each takes the folder of a whole one."""

import json
import pickle
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

WEIGHTS, CONFIG, TOKENS = "model.safetensors", "config.json", "tokens.txt"


def missing(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()


def empty_folder(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


def without_tokens(folder: Path) -> None:
    (folder / TOKENS).unlink()


def a_folder_where_the_weights_should_be(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    (folder / WEIGHTS).mkdir()


def truncated(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def one_bit_flipped(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (folder / WEIGHTS).write_bytes(content)


def no_weights_at_all(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(b"")


def a_pickle_in_the_folder(folder: Path) -> None:
    (folder / WEIGHTS).unlink()
    torch.save({}, folder / "final.pt")


def a_pickle_by_another_name(folder: Path) -> None:
    torch.save({}, folder / WEIGHTS)


def an_old_pickle_by_another_name(folder: Path) -> None:
    (folder / WEIGHTS).write_bytes(pickle.dumps({}, protocol=2))


def nan(folder: Path) -> None:
    change(folder, "ctc.weight", lambda t: t.index_put((torch.tensor(0), torch.tensor(0)), torch.tensor(float("nan"))))


def infinite(folder: Path) -> None:
    change(folder, "ctc.bias", lambda t: t.index_put((torch.tensor(0),), torch.tensor(float("inf"))))


def too_large_for_float32(folder: Path) -> None:
    change(folder, "ctc.bias", lambda t: t.double() + 1e300)


def variance_of_zero(folder: Path) -> None:
    change(folder, "blocks.0.macaron.w1.norm.running_var", torch.zeros_like)


def negative_deviation(folder: Path) -> None:
    change(folder, "frontend.istd", lambda t: -t)


def transposed(folder: Path) -> None:
    change(folder, "blocks.0.macaron.w1.linear.weight", lambda t: t.T.contiguous())


def integers(folder: Path) -> None:
    change(folder, "ctc.weight", lambda t: t.int())


def one_tensor_missing(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    del tensors["ctc.bias"]
    save_file(tensors, folder / WEIGHTS)


def one_tensor_too_many(folder: Path) -> None:
    save_file({**load_file(folder / WEIGHTS), "decoder.weight": torch.zeros(2)}, folder / WEIGHTS)


def another_width_in_the_config(folder: Path) -> None:
    change_config(folder, dimension=32)


def unknown_key(folder: Path) -> None:
    change_config(folder, dimensions=16)


def missing_key(folder: Path) -> None:
    fields = json.loads((folder / CONFIG).read_text())
    del fields["heads"]
    (folder / CONFIG).write_text(json.dumps(fields))


def key_twice(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace("{", '{"heads": 1,', 1))


def a_word_for_a_number(folder: Path) -> None:
    change_config(folder, layers="two")


def true_for_a_number(folder: Path) -> None:
    change_config(folder, layers=True)


def nan_in_the_config(folder: Path) -> None:
    change_config(folder, dropout=float("nan"))


def heads_that_do_not_divide(folder: Path) -> None:
    change_config(folder, heads=3)


def an_endless_number(folder: Path) -> None:
    text = (folder / CONFIG).read_text()
    (folder / CONFIG).write_text(text.replace('"layers": ', f'"layers": {"9" * 5000}', 1))


def not_json(folder: Path) -> None:
    (folder / CONFIG).write_text("dimension: 16")


def a_list_for_a_config(folder: Path) -> None:
    (folder / CONFIG).write_text("[]")


def not_text(folder: Path) -> None:
    (folder / TOKENS).write_bytes(b"\xff\xfe<blk>")


def one_token_too_few(folder: Path) -> None:
    tokens = (folder / TOKENS).read_text().splitlines()
    (folder / TOKENS).write_text("\n".join(tokens[:-1]))


def a_token_twice(folder: Path) -> None:
    tokens = (folder / TOKENS).read_text().splitlines()
    (folder / TOKENS).write_text("\n".join([*tokens[:-1], tokens[-2]]))


def no_blank(folder: Path) -> None:
    tokens = (folder / TOKENS).read_text().splitlines()
    (folder / TOKENS).write_text("\n".join(["!", *tokens[1:]]))


def change(folder: Path, name: str, how) -> None:
    """Change one tensor and write the file as another program would: without our digest."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = how(tensors[name])
    save_file(tensors, folder / WEIGHTS)


def change_config(folder: Path, **fields: object) -> None:
    whole = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps({**whole, **fields}))
