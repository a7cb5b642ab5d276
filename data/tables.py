"""Tables in hub form, of this machine or of the Hugging Face hub, as rows. Whatever cannot be read is told with
file and row."""
import codecs
import csv
import io
import json

from data import UserError, user_error
from data.files import form

csv.field_size_limit(2 ** 31 - 1)  # a cell may hold a book


def refuse_missing(column, columns, where):
    """Raises UserError if the column that --column names is not there."""
    if column not in columns:
        raise UserError(f"{where} has no column {column!r}; it has {', '.join(map(str, columns))}; choose one with "
                        f"--column (of images: --label-column)")


class LocalTable:
    """Files of one form, as one table."""

    def __init__(self, listing, names):
        self.listing, self.names = listing, names

    def shown(self, name):
        return name or self.listing.root.name

    def rows(self, columns=None):
        """Yields (where, {column: value}); where says file and row. `columns` are those that are needed."""
        for name in self.names:
            path = self.listing.path(name)
            read = READERS[form(self.shown(name))]
            yield from read(path, self.shown(name), columns)

    def features(self):
        """Yields (file, {column: its datasets.Feature}) of each .parquet or .arrow file."""
        import datasets
        import pyarrow.parquet
        for name in self.names:
            path = self.listing.path(name)
            with user_error(f"{self.shown(name)} cannot be read"):
                if form(self.shown(name)) == "parquet":
                    schema = pyarrow.parquet.read_schema(path)
                else:
                    schema = arrow_batches(path).schema
                features = dict(datasets.Features.from_arrow_schema(schema))
            yield self.shown(name), features

    def n_rows(self):
        """The number of rows, or None where only reading tells."""
        import pyarrow.parquet
        if any(form(self.shown(name)) != "parquet" for name in self.names):
            return None
        n = 0
        for name in self.names:
            with user_error(f"{self.shown(name)} cannot be read"):
                n += pyarrow.parquet.ParquetFile(self.listing.path(name)).metadata.num_rows
        return n


def rows_of_batches(batches, name):
    """Rows of pyarrow's record batches, one after another."""
    number = 0
    while True:
        with user_error(f"{name} cannot be read after row {number}"):
            batch = next(batches, None)
            rows = batch.to_pylist() if batch is not None else None
        if rows is None:
            return
        for row in rows:
            yield f"{name}, row {number}", row
            number += 1


def read_parquet(path, name, columns):
    import pyarrow.parquet
    with user_error(f"{name} cannot be read"):
        file = pyarrow.parquet.ParquetFile(path)
        for column in columns or []:
            refuse_missing(column, file.schema_arrow.names, name)
        batches = file.iter_batches(batch_size=256, columns=columns)
    yield from rows_of_batches(batches, name)


def arrow_batches(path):
    """A reader of an .arrow file, which is in pyarrow's format of a stream or of a file."""
    import pyarrow
    source = pyarrow.memory_map(str(path))
    try:
        return pyarrow.ipc.open_stream(source)
    except pyarrow.ArrowInvalid:
        return pyarrow.ipc.open_file(source)


def read_arrow(path, name, columns):
    with user_error(f"{name} cannot be read"):
        reader = arrow_batches(path)
        if hasattr(reader, "num_record_batches"):  # of a file: batches by their number
            batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
        else:
            batches = iter(reader)
    yield from rows_of_batches(batches, name)


def open_packed(path):
    """A file's bytes as a stream, unpacked if it is .gz or .zst."""
    import pyarrow
    compression = {".gz": "gzip", ".zst": "zstd"}.get(path.suffix.lower())
    return io.BufferedReader(pyarrow.input_stream(str(path), compression=compression))


def read_json(path, name, columns):
    """A JSON value a line, or one list of them."""
    with user_error(f"{name} cannot be read"), open_packed(path) as file:
        begin = file.peek(1024)[:1024].removeprefix(codecs.BOM_UTF8).lstrip()
        if begin.startswith(b"["):
            for number, row in enumerate(json.loads(file.read())):
                yield checked_row(row, f"{name}, row {number}")
            return
        for number, line in enumerate(file):
            where = f"{name}, line {number + 1}"
            if number == 0:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                with user_error(f"{where} is not JSON", ValueError):
                    row = json.loads(line)
                yield checked_row(row, where)


def checked_row(row, where):
    if not isinstance(row, dict):
        raise UserError(f"{where} holds no columns: it must look like {{\"text\": \"...\"}}")
    return where, row


def decoded(lines):
    """Lines of bytes as str, each when it is asked for, so that an error is found at its row."""
    encoding = "utf-8-sig"  # a mark may stand before the first line
    for line in lines:
        yield line.decode(encoding)
        encoding = "utf-8"


def read_csv(path, name, columns, delimiter=","):
    """The first line names the columns. Every cell is text: one that says null is the word null."""
    with user_error(f"{name} cannot be read"), open_packed(path) as file:
        lines = csv.reader(decoded(file), delimiter=delimiter, strict=True)
        columns = None
        number = 0  # of the next row
        while True:
            with user_error(f"{name}, row {number} cannot be read; is it CSV in UTF-8?"):
                cells = next(lines, None)
            if cells is None:
                return
            if columns is None:
                columns = checked_header(cells, name)
                continue
            if cells == []:  # an empty line
                continue
            if len(cells) != len(columns):
                raise UserError(f"{name}, row {number}: {len(cells)} cells, but the first line names "
                                f"{len(columns)} columns")
            yield f"{name}, row {number}", dict(zip(columns, cells))
            number += 1


def checked_header(columns, name):
    """The names of columns. Raises UserError if there are none, or one is there twice."""
    if columns == []:
        raise UserError(f"{name}: the first line is empty, but must name the columns")
    for column in columns:
        if columns.count(column) > 1:
            raise UserError(f"{name}: the first line names the column {column!r} twice")
    return columns


def read_tsv(path, name, columns):
    return read_csv(path, name, columns, "\t")


READERS = {"parquet": read_parquet, "arrow": read_arrow, "json": read_json, "csv": read_csv, "tsv": read_tsv}


class HubTable:
    """A split of a dataset of the Hugging Face hub, streamed or as a whole."""

    def __init__(self, dataset, name):
        self.dataset, self.name = dataset, name

    def rows(self, columns=None):
        import datasets
        dataset = self.dataset
        features = dataset.features or {}
        if columns and set(columns) <= set(features):
            dataset = dataset.select_columns(columns)
            for column in columns:
                if isinstance(features[column], datasets.Image):
                    dataset = dataset.cast_column(column, datasets.Image(decode=False))
        number, rows = 0, iter(dataset)
        while True:
            problem = f"{self.name}: row {number} cannot be read"
            with user_error(problem), user_error(f"{problem}; is the network there?", OSError):
                row = next(rows, None)
            if row is None:
                return
            yield f"{self.name}, row {number}", row
            number += 1

    def features(self):
        """Yields (name, {column: its datasets.Feature}), once."""
        yield self.name, dict(self.dataset.features)


def hub_tables(settings, streaming):
    """{split: HubTable} of a dataset of the hub: all its splits."""
    source, config = settings.data, settings.config
    with user_error(f"--data {source} is not on the disk, and asking the Hugging Face hub failed"):
        import datasets
        import huggingface_hub
        if not datasets.config.HF_HUB_OFFLINE:
            # ask once whether it is there: load_dataset repeats a request that fails for half a minute
            huggingface_hub.HfApi().dataset_info(source, timeout=10)
        names = datasets.get_dataset_config_names(source)
    shown = ", ".join(repr(name) for name in names)
    if config and config not in names:
        raise UserError(f"--data {source} has no --config {config!r}; it has {shown}")
    if len(names) > 1 and not config and "default" not in names:
        raise UserError(f"--data {source} has several configurations; choose one with --config: {shown}")
    with user_error(f"--data {source} cannot be loaded"):
        found = datasets.load_dataset(source, config or None, streaming=streaming)
    return {split: HubTable(dataset, f"{source}, {split}") for split, dataset in found.items()}
