"""The same numbered images as every kind of data that is read: shades of grey, captioned by their numbers."""

import io
import json
import tarfile

import numpy as np
from PIL import Image

from jaxdiff.data.records import example_class

SIZE = 8  # pixels


def numbered_image(number: int, size: tuple[int, int] = (SIZE, SIZE), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, (number, number, number)).save(file, kind)
    return file.getvalue()


def rows(count, bad=(), sizes=None):
    """What each example holds; the images in `bad` are cut off."""
    for i in range(count):
        data = numbered_image(i, sizes[i % len(sizes)] if sizes else (SIZE, SIZE))
        yield {"image": data[:-30] if i in bad else data, "text": [f"{i}", f"number {i}"], "score": i / 10}


def add(tar: tarfile.TarFile, name: str, data: bytes, **fields) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for field, value in fields.items():
        setattr(info, field, value)
    tar.addfile(info, io.BytesIO(data))


def write_tars(folder, count, shard=5, format=tarfile.PAX_FORMAT, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    found = list(rows(count, **kwargs))
    for first in range(0, count, shard):
        with tarfile.open(folder / f"{first // shard:05d}.tar", "w", format=format) as tar:
            for i, row in enumerate(found[first : first + shard], first):
                add(tar, f"{i:04d}.png", row["image"])
                add(tar, f"{i:04d}.json", json.dumps({"caption": row["text"], "score": row["score"]}).encode())
    return folder


def write_parquet(folder, count, shard=5, group=2, **kwargs):
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder.mkdir(parents=True, exist_ok=True)
    found = list(rows(count, **kwargs))
    for first in range(0, count, shard):
        table = pa.Table.from_pylist(found[first : first + shard])
        pq.write_table(table, folder / f"train-{first // shard:05d}.parquet", row_group_size=group)
    return folder


def write_arrow(folder, count, shard=5, **kwargs):
    """As datasets.Dataset.save_to_disk lays it out: files in Arrow's streaming format, named by state.json."""
    import pyarrow as pa

    folder.mkdir(parents=True, exist_ok=True)
    found, names = list(rows(count, **kwargs)), []
    for first in range(0, count, shard):
        names.append(f"data-{first // shard:05d}-of-{-(-count // shard):05d}.arrow")
        part = [{**r, "image": {"bytes": r["image"], "path": None}} for r in found[first : first + shard]]
        kind = pa.struct({"bytes": pa.binary(), "path": pa.string()})
        schema = pa.schema({"image": kind, "text": pa.list_(pa.string()), "score": pa.float64()})
        table = pa.Table.from_pylist(part, schema)
        with pa.OSFile(str(folder / names[-1]), "wb") as file, pa.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": n} for n in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def write_records(folder, count, shard=5, **kwargs):
    from array_record.python.array_record_module import ArrayRecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    found, example = list(rows(count, **kwargs)), example_class()
    for first in range(0, count, shard):
        writer = ArrayRecordWriter(str(folder / f"{first // shard:05d}.array_record"), "group_size:1")
        for row in found[first : first + shard]:
            e = example()
            e.features.feature["image"].bytes_list.value.append(row["image"])
            e.features.feature["text"].bytes_list.value.extend(t.encode() for t in row["text"])
            e.features.feature["score"].float_list.value.append(row["score"])
            e.features.feature["id"].int64_list.value.append(-5)
            writer.write(e.SerializeToString())
        writer.close()
    return folder


def write_folder(folder, count, **kwargs):
    folder.mkdir(parents=True, exist_ok=True)
    lines = []
    for i, row in enumerate(rows(count, **kwargs)):
        (folder / f"{i}.png").write_bytes(row.pop("image"))
        lines.append({"file_name": f"{i}.png", **row})
    (folder / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder


WRITERS = {
    "folder": write_folder, "tar": write_tars, "parquet": write_parquet, "arrow": write_arrow, "records": write_records,
}  # fmt: skip


def numbers(batch) -> list[int]:
    """Which of the numbered images a batch holds; image and caption must belong together."""
    shades = np.asarray(batch["image"])[:, 0, 0, 0].tolist()
    assert [t.removeprefix("number ") for t in batch["text"]] == [str(s) for s in shades]
    return shades
