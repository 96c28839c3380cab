"""Data that are missing, altered, or fetched; the public home is a server in this process."""

import functools
import hashlib
import http.server
import threading

import pytest

from equigrad.errors import DataError
from equigrad.experiments.data.boston_housing import without_first_line
from equigrad.experiments.data.files import FOLDER, DataFile

CONTENT = b'"A","B"\n' + b"1,2\n" * 1000


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """The address of a folder on a local server, and the folder."""
    folder = tmp_path_factory.mktemp("home")
    handler = functools.partial(Quiet, directory=str(folder))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", folder
        server.shutdown()
        thread.join()


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format, *args):
        pass


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """A cache of our own, and no folder set."""
    pooch = pytest.importorskip("pooch")
    monkeypatch.delenv(FOLDER, raising=False)
    monkeypatch.setattr(pooch, "os_cache", lambda project: tmp_path / project)
    return tmp_path / "equigrad"


def data_file(url, content=CONTENT):
    return DataFile(
        name="set/table.csv",
        md5=hashlib.md5(content).hexdigest(),
        url=url,
        convert=without_first_line,
    )


def test_fetched_once_converted_and_kept(home, cache):
    address, folder = home
    (folder / "good.csv").write_bytes(b"1000,2,,\n" + CONTENT)
    file = data_file(f"{address}/good.csv")
    path = file.find()
    assert path == cache / "set" / "table.csv"
    assert path.read_bytes() == CONTENT
    (folder / "good.csv").unlink()  # the second time nothing is fetched
    assert file.find() == path
    assert [child.name for child in path.parent.iterdir()] == ["table.csv"]


def test_file_without_conversion_is_kept_as_it_is(home, cache):
    address, folder = home
    (folder / "plain.csv").write_bytes(CONTENT)
    md5 = hashlib.md5(CONTENT).hexdigest()
    path = DataFile(name="plain.csv", md5=md5, url=f"{address}/plain.csv").find()
    assert path.read_bytes() == CONTENT


@pytest.mark.parametrize("change", [lambda c: c[:-7], lambda c: c.replace(b"1,2", b"1,3", 1)])
def test_home_that_holds_something_else(home, cache, change):
    address, folder = home
    (folder / "bad.csv").write_bytes(b"1000,2,,\n" + change(CONTENT))
    with pytest.raises(DataError, match=r"truncated or altered.*is not what it was"):
        data_file(f"{address}/bad.csv").find()
    assert not list((cache / "set").iterdir())


def test_home_that_does_not_answer(home, cache):
    address, _ = home
    with pytest.raises(DataError, match=f"cannot fetch set/table.csv from .*404.*set {FOLDER}"):
        data_file(f"{address}/gone.csv").find()


def test_altered_cache_is_named(home, cache):
    (cache / "set").mkdir(parents=True)
    (cache / "set" / "table.csv").write_bytes(CONTENT[:100])
    with pytest.raises(DataError, match=r"100 bytes with md5 .*Delete it to have it fetched again"):
        data_file("http://127.0.0.1:9/unused").find()


def test_folder_of_the_user(tmp_path, monkeypatch):
    monkeypatch.setenv(FOLDER, str(tmp_path))
    file = data_file("https://example.org/table.csv")
    path = tmp_path / "set" / "table.csv"
    with pytest.raises(DataError, match=r"table.csv is not there.*unset EQUIGRAD_DATA.*example"):
        file.find()
    path.parent.mkdir()
    path.write_bytes(CONTENT)
    assert file.find() == path
    path.write_bytes(CONTENT + b"1,2\n")
    with pytest.raises(DataError, match=r"truncated or altered.*expected md5.*Replace it"):
        file.find()
    assert path.exists()  # the user's file is never deleted
