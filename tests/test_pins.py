"""The private parts of other packages that we use, each by name.

A minor release may change such a part without notice, so pyproject.toml pins these packages below
their next minor version. Before raising a pin: install the new version, run this file, read in the
history of the package how each part named below has changed, and run the files in `LOOK_AT`.
"""

import ast
import importlib
import importlib.metadata
import inspect
import pkgutil
import re
import textwrap
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import FunctionType

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parent.parent
SOURCE = {
    str(path.relative_to(ROOT)): ast.parse(path.read_text())
    for pattern in ("ai_*.py", "ai_internal/**/*.py", "providers/**/*.py")
    for path in ROOT.glob(pattern)
}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
PINS = {each.name: each.specifier for each in map(Requirement, PROJECT["dependencies"])}

# The only one of our files that may use private parts of a package.
USER = {"waitress": "ai_internal/server/listener.py", "pg8000": "ai_internal/server/database.py"}
LOOK_AT = {
    "waitress": "tests/test_{server,bad_input,hostile,faults,payloads,rolling}.py and `make bench`",
    "pg8000": "tests/test_{database,database_url,pgbouncer,payloads}.py and `make pgbouncer`",
}

# What we name of the modules of a package: a class or function with its parameters, or the type of
# a constant.
NAMES = {
    "waitress": {
        "channel.HTTPChannel": "(server, sock, addr, adj, map)",
        "parser.HTTPRequestParser": "(adj)",
        "server.create_server": "(application, map, _start, _sock, _dispatcher, **kw)",
        "task.ErrorTask": "(channel, request)",
        "task.ThreadedTaskDispatcher": "()",
        "task.WSGITask": "(channel, request)",
        "utilities.BadRequest": "(body)",
        "utilities.Error": "(body)",
        "utilities.RequestEntityTooLarge": "(body)",
        "wasyncore.dispatcher": "(sock, map)",
        "wasyncore.readwrite": "(obj, flags)",
    },
    "pg8000": {
        "core.Context": "(statement, stream, columns, input_funcs)",
        "core.DESCRIBE": "bytes",
        "core.FLUSH_MSG": "bytes",
        "core.IN_TRANSACTION": "bytes",
        "core.NULL_BYTE": "bytes",
        "core.PORTAL": "bytes",
        "core.SYNC_MSG": "bytes",
        "native.to_statement": "(query)",
    },
}
# Class → its members that we read, set, call or override; a method with its parameters.
MEMBERS = {
    "waitress": {
        "buffers.OverflowableBuffer": "__len__() append(s) close()",
        "channel.HTTPChannel": """adj addr connected error_task_class last_activity outbuf_lock
            parser_class request requests requests_lock server task_class total_outbufs_len
            will_close add_channel(map) del_channel(map) handle_close() handle_write() readable()
            received(data) send(data, do_close) service() writable() write_soon(data)""",
        "parser.HTTPRequestParser": """body_bytes_received body_rcv chunked command completed
            content_length error expect_continue headers path close() received(data)""",
        "receiver.ChunkedReceiver": "buf control_line trailer __len__()",
        "receiver.FixedStreamReceiver": "buf __len__()",
        "server.BaseWSGIServer": """active_channels channel_class in_connection_overflow
            task_dispatcher trigger add_task(task) handle_accept() pull_trigger()""",
        "task.ErrorTask": "execute()",
        "task.Task": """channel close_on_finish content_length request response_headers status
            wrote_header build_response_header() service() write(data)""",
        "task.ThreadedTaskDispatcher": """lock queue add_task(task) set_thread_count(count)
            shutdown(cancel_pending, timeout)""",
        "trigger.trigger": "trigger pull_trigger(thunk)",
        "utilities.Error": "code reason",
        "wasyncore.dispatcher": "_fileno _map accepting socket close()",
    },
    "pg8000": {
        "core.Context": "rows",
        "core.CoreConnection": """_sock _transaction_status _usock _send_message(code, data)
            handle_messages(context) send_BIND(statement_name_bin, params) send_EXECUTE()
            send_PARSE(statement_name_bin, statement, oids)""",
        "native.PreparedStatement": "_context",
    },
}
# Documented names.
PUBLIC = {
    "pg8000.native.Connection",
    "pg8000.native.DatabaseError",
    "pg8000.native.InterfaceError",
    "pg8000.native.PreparedStatement",
}
# Members of a package that our file uses by the same name, and that are documented or belong to
# something else: to our classes, a dict, a key of selectors.
OTHER = {
    "waitress": {"__init__", "fd", "get", "run"},
    "pg8000": {"__init__", "close", "prepare", "run", "DatabaseError", "InterfaceError"},
}
# Private names of the standard library: CI runs the Python releases that we support.
STANDARD_LIBRARY = {("ai_internal/server/database.py", "_value"): "threading.Semaphore"}
# A public method of named tuples (urllib3's Url).
NAMED_TUPLE = {"_replace"}

each_package = pytest.mark.parametrize("package", USER)


def words(text: str) -> list[str]:
    """`a b(c, d)` as `a` and `b(c,d)`."""
    return " ".join(text.split()).replace(", ", ",").split()


def stored(tree: ast.AST) -> list[ast.AST]:
    """The names and attributes that a source assigns to."""
    return [node for node in ast.walk(tree) if isinstance(getattr(node, "ctx", None), ast.Store)]


def classes(tree: ast.AST) -> list[ast.ClassDef]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def attributes(tree: ast.AST) -> list[ast.Attribute]:
    return [node for node in ast.walk(tree) if isinstance(node, ast.Attribute)]


def declared(cls: ast.ClassDef) -> Iterator[str]:
    """The methods and the attributes in the body of a class."""
    for node in cls.body:
        if isinstance(node, ast.FunctionDef):
            yield node.name
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            yield from (name.id for name in stored(node) if isinstance(name, ast.Name))


def defined(cls: ast.ClassDef) -> set[str]:
    """What a class declares, and what its methods set on `self`."""
    assigned = [node for node in stored(cls) if isinstance(node, ast.Attribute)]
    return {*declared(cls), *(each.attr for each in assigned if ast.unparse(each.value) == "self")}


def defined_by_package(package: str) -> set[str]:
    found = importlib.import_module(package)
    names = [each.name for each in pkgutil.walk_packages(found.__path__, f"{package}.")]
    modules = [importlib.import_module(name) for name in names if not name.endswith("__main__")]
    trees = [ast.parse(inspect.getsource(module)) for module in modules]
    return {name for tree in trees for cls in classes(tree) for name in defined(cls)}


def used(tree: ast.AST) -> set[str]:
    """The names of members that a source reads, sets, declares in a class, or uses by `len`."""
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    found = {each.attr for each in attributes(tree)}
    found |= {name for cls in classes(tree) for name in declared(cls)}
    return found | {"__len__"} if "len" in called else found


def used_private(tree: ast.AST) -> set[str]:
    """Private attributes that a source uses and none of its classes defines."""
    private = {each.attr for each in attributes(tree) if re.match("_[^_]", each.attr)}
    return private - NAMED_TUPLE - {name for cls in classes(tree) for name in defined(cls)}


def named(tree: ast.AST, package: str) -> set[str]:
    """What a source names of the modules of a package, such as `waitress.task.WSGITask`."""
    imports = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)]
    found = {f"{node.module}.{alias.name}" for node in imports for alias in node.names}
    found |= {ast.unparse(each) for each in attributes(tree)}
    return {name for name in found if re.fullmatch(rf"{package}\.\w+\.\w+", name)} - PUBLIC


def loaded(package: str, path: str) -> object:
    module, _, name = path.partition(".")
    return getattr(importlib.import_module(f"{package}.{module}"), name, None)


def shape(found: object) -> str:
    """`(a,b)` of a class or function without `self`; the type of anything else."""
    if not callable(found):
        return type(found).__name__
    stars = {inspect.Parameter.VAR_POSITIONAL: "*", inspect.Parameter.VAR_KEYWORD: "**"}
    parameters = inspect.signature(found).parameters.values()
    shown = [stars.get(each.kind, "") + each.name for each in parameters if each.name != "self"]
    return f"({','.join(shown)})"


def member(cls: type, name: str) -> str | None:
    """A member as MEMBERS writes it; None if the class has none of that name."""
    found = inspect.getattr_static(cls, name, None)
    if isinstance(found, FunctionType):
        return name + shape(found)
    sources = [inspect.getsource(base) for base in cls.__mro__ if base is not object]
    trees = [ast.parse(textwrap.dedent(source)) for source in sources]
    return name if any(name in defined(each) for tree in trees for each in classes(tree)) else None


def advice(package: str) -> str:
    version = importlib.metadata.version(package)
    where = "read the head of tests/test_pins.py and correct its tables"
    return f"{package} {version}: {where}; then run {LOOK_AT[package]}"


@each_package
def test_the_installed_version_has_each_part_in_the_shape_that_we_need(package: str) -> None:
    for path, listed in NAMES[package].items():
        wanted = "".join(words(listed))
        assert shape(loaded(package, path)) == wanted, f"{path} in {advice(package)}"
    for path, listed in MEMBERS[package].items():
        cls = loaded(package, path)
        assert isinstance(cls, type), f"no class {path} in {advice(package)}"
        found = [member(cls, each.partition("(")[0]) for each in words(listed)]
        assert found == words(listed), f"{path} in {advice(package)}"


@each_package
def test_the_tables_name_every_private_part_that_the_source_uses(package: str) -> None:
    tree = SOURCE[USER[package]]
    assert named(tree, package) == {f"{package}.{path}" for path in NAMES[package]}, advice(package)
    listed = {each.partition("(")[0] for text in MEMBERS[package].values() for each in words(text)}
    found = used(tree) & defined_by_package(package) - OTHER[package]
    assert found == listed, advice(package)


def test_no_other_file_uses_a_private_part() -> None:
    named_elsewhere = {
        (file, name)
        for package, user in USER.items()
        for file, tree in SOURCE.items()
        for name in named(tree, package)
        if file != user and not name.startswith("pg8000.exceptions.")
    }
    assert named_elsewhere == set()
    private = {(file, name) for file, tree in SOURCE.items() for name in used_private(tree)}
    listed = {(USER[package], name) for package in USER for name in defined_by_package(package)}
    assert private - listed == set(STANDARD_LIBRARY)


@each_package
def test_the_pin_ends_before_the_next_minor_version(package: str) -> None:
    installed = importlib.metadata.version(package)
    major, minor, *_ = installed.split(".")
    assert installed in PINS[package]
    assert f"{major}.{int(minor) + 1}.0" not in PINS[package], advice(package)


def test_a_part_that_no_table_names_is_found() -> None:
    tree = ast.parse(
        "import pg8000.core\nfrom pg8000.native import identifier\n"
        "class Own(pg8000.core.CoreConnection):\n    py_types = {}\n"
        "    def execute_simple(self): self._mine = len(self._caches)\n"
    )
    assert named(tree, "pg8000") == {"pg8000.core.CoreConnection", "pg8000.native.identifier"}
    assert used_private(tree) == {"_caches"}
    assert used(tree) & defined_by_package("pg8000") == {"_caches", "execute_simple", "py_types"}
    assert member(ast.NodeVisitor, "visit_all") is None
