"""Pipelines as text: what parses, what prints back, and what is said about text that does not parse."""

from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.diagnostics import DiagnosticError
from passes import Pass, PassContext, find_pass, parse_pipeline, print_pipeline, register_pass, registered_passes
from passes.pipelines import PIPELINES
from passes.simplify.canonicalize import CanonicalizePass
from passes.simplify.cse import CSEPass


@register_pass
@dataclass(frozen=True)
class OptionsPass(Pass):
    """Does nothing; has an option of every kind."""

    name: ClassVar[str] = "test-options"
    max_k: int = 8
    ratio: float = 0.5
    flag: bool = False
    text: str = ""
    mode: Literal["fast", "small"] = "fast"
    sizes: tuple[int, ...] = ()
    limit: int | None = None

    def __post_init__(self) -> None:
        if self.max_k > 1000:
            raise ValueError(f"max-k = {self.max_k} is too large")

    def run(self, module: object, ctx: PassContext) -> None:
        """Leaves everything as it is."""


def test_options_are_typed_and_default():
    (found,) = parse_pipeline('test-options{max-k=16 flag text="a, b" mode=small sizes=1,2,3 limit=none ratio=1e-3}')
    assert found == OptionsPass(16, 1e-3, True, "a, b", "small", (1, 2, 3), None)
    assert parse_pipeline("test-options") == parse_pipeline("test-options{}") == (OptionsPass(),)


def test_blanks_do_not_matter():
    spread = " canonicalize ,\n  test-options { max-k = 16\n sizes = 1 , 2 } , cse "
    assert parse_pipeline(spread) == parse_pipeline("canonicalize,test-options{max-k=16 sizes=1,2},cse")
    assert parse_pipeline("  ") == ()


def test_only_what_differs_from_the_default_is_printed():
    passes = (CanonicalizePass(), OptionsPass(max_k=9, text='say "no"'), CSEPass())
    assert print_pipeline(passes) == r'canonicalize,test-options{max-k=9 text="say \"no\""},cse'


@given(
    st.builds(
        OptionsPass,
        st.integers(-1000, 1000),
        st.floats(allow_nan=False),
        st.booleans(),
        st.text(),
        st.sampled_from(["fast", "small"]),
        st.lists(st.integers(), max_size=4).map(tuple),
        st.none() | st.integers(),
    )
)
def test_printing_parses_back(found):
    assert parse_pipeline(print_pipeline([found, found])) == (found, found)


@pytest.mark.parametrize("name", sorted(PIPELINES))
def test_named_pipelines_parse_back(name):
    pipeline = PIPELINES[name]()
    assert parse_pipeline(print_pipeline(pipeline)) == pipeline


@pytest.mark.parametrize(
    ("text", "message", "column"),
    [
        ("cse,canonicalise", "unknown pass 'canonicalise'; did you mean 'canonicalize'?", 5),
        ("test-options{max-q=1}", "pass 'test-options' has no option 'max-q'; did you mean 'max-k'?", 14),
        ("cse{x=1}", "pass 'cse' has no option 'x'", 5),
        ("test-options{max-k=many}", "option 'max-k' takes a whole number, got 'many'", 20),
        ("test-options{max-k=1,2}", "option 'max-k' takes one value", 22),
        ("test-options{flag=yes}", "option 'flag' takes true or false, got 'yes'", 19),
        ("test-options{mode=smal}", "option 'mode' takes fast or small, got 'smal'; did you mean 'small'?", 19),
        ("test-options{max-k}", "option 'max-k' needs a value: max-k=a whole number", 14),
        ("test-options{sizes=1,x}", "option 'sizes' takes a whole number, got 'x'", 22),
        ("test-options{max-k=1 max-k=2}", "option 'max-k' is given twice", 22),
        ("test-options{max-k=1, flag=true}", "expected a value, got option 'flag'", 23),
        ("test-options{max-k=1", "the options of 'test-options' are not closed by '}'", 21),
        ('test-options{text="a}', "the string is not closed", 19),
        ("cse,,cse", "expected the name of a pass, got ','", 5),
        ("cse,", "expected the name of a pass, got 'the end'", 5),
        ("cse cse", "expected ',' between passes, got 'cse'", 5),
        ("test-options{max-k=2000}", "pass 'test-options': max-k = 2000 is too large", 1),
    ],
)
def test_faults_are_shown_where_they_are(text, message, column):
    with pytest.raises(DiagnosticError) as caught:
        parse_pipeline(text)
    (found,) = caught.value.diagnostics
    assert found.message == message
    assert (found.location.line, found.location.column) == (1, column)
    assert text in str(caught.value)
    assert "\n" + " " * (column - 1) + "^" in str(caught.value)


def test_the_line_of_a_fault_is_told():
    with pytest.raises(DiagnosticError) as caught:
        parse_pipeline("canonicalize,\n  csee", where="pipeline.txt")
    assert str(caught.value).startswith("pipeline.txt:2:3: error: unknown pass 'csee'")


def test_every_pass_has_a_name_in_kebab_case_and_a_docstring():
    for name, cls in registered_passes().items():
        assert name == cls.name == name.lower().replace("_", "-")
        assert cls.__doc__ and not cls.__doc__.startswith(cls.__name__ + "("), name


def test_one_name_belongs_to_one_pass():
    class OtherPass(Pass):
        name = "cse"

    with pytest.raises(ValueError, match=r"pass cse is registered by passes\.simplify\.cse already"):
        register_pass(OtherPass)
    with pytest.raises(ValueError, match="has no name"):
        register_pass(type("Nameless", (Pass,), {}))


class _EntryPoint:
    name = "third-party"
    value = "some_package.passes:ThirdParty"

    def __init__(self, loaded: object) -> None:
        self.loaded = loaded

    def load(self) -> object:
        if isinstance(self.loaded, Exception):
            raise self.loaded
        return self.loaded


@pytest.fixture
def entry_points(monkeypatch):
    """Sets what the entry points of the group are; the registry is put back afterwards."""
    from passes import pass_base

    find_pass("cse")
    monkeypatch.setattr(pass_base, "PASSES", dict(pass_base.PASSES))
    monkeypatch.setattr(pass_base, "_loaded", {"built-in": True, "entry points": False})
    pass_base.load_failures.clear()

    def set_to(*found: object) -> None:
        def entry_points(group: str) -> list[_EntryPoint]:
            assert group == "stratum.passes"
            return [_EntryPoint(f) for f in found]

        monkeypatch.setattr("importlib.metadata.entry_points", entry_points)

    yield set_to
    pass_base.load_failures.clear()


def test_passes_of_other_packages_are_found_by_name(entry_points):
    third = dataclass(frozen=True)(type("ThirdParty", (Pass,), {"name": "third-party", "__doc__": "Not ours."}))
    entry_points(third)
    assert parse_pipeline("cse,third-party") == (CSEPass(), third())


@pytest.mark.parametrize(
    ("loaded", "reason"),
    [
        (ImportError("no module named some_package"), "ImportError: no module named some_package"),
        ("a text", "TypeError: some_package.passes:ThirdParty is no pass"),
        (type("Clash", (Pass,), {"name": "cse"}), "ValueError: pass cse is registered by passes.simplify.cse already"),
    ],
)
def test_a_package_that_cannot_be_loaded_is_named(entry_points, loaded, reason):
    entry_points(loaded)
    assert parse_pipeline("cse") == (CSEPass(),)  # nobody asked for it
    with pytest.raises(DiagnosticError) as caught:
        parse_pipeline("third-party")
    assert f"the pass 'third-party' of another package cannot be loaded: {reason}" in str(caught.value)
    with pytest.raises(DiagnosticError) as caught:
        parse_pipeline("csee")
    assert "did you mean 'cse'?" in str(caught.value)
    assert f"pass 'third-party' cannot be loaded: {reason}" in str(caught.value)
