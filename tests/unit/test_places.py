"""Where a call goes: all spellings of one call give one division and one endpoint."""

from __future__ import annotations

from urllib.parse import quote

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from holdoff._places import MOST_ENDPOINT_CHARACTERS, find_place, folded, normal_endpoint
from holdoff.cli._conduct import Rooms
from holdoff.policies import presets
from holdoff.v1 import budget_pb2, lease_service_pb2
from holdoff_coordinator.policies import policy_message

EXACT = presets()["exact-online"]
ACCOUNTS = ("535193", "crm/Accounts")


@pytest.mark.parametrize(
    ("url", "place"),
    [
        ("/api/v1/535193/crm/Accounts", ACCOUNTS),
        ("crm/Accounts", ("", "crm/Accounts")),
        ("", ("", "")),
        # Whatever the host.
        ("https://start.exactonline.nl/api/v1/535193/crm/Accounts?$filter=a", ACCOUNTS),
        ("https://ann:secret@gateway.example:8443/exact/api/v1/535193/crm/Accounts#x", ACCOUNTS),
        ("https://start.exactonline.nl", ("", "")),
        # Keys, and what belongs to an entity.
        ("/api/v1/535193/crm/Accounts(guid'1-2')?$select=ID", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts(Id=1,Name='x(y''z)/;?')/", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts(guid'1", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts%28guid%271-2%27%29", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts(guid'1-2')/Contacts", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts(guid'1-2')/$links/Contacts", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts/$count", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts/%24value", ACCOUNTS),
        ("/api/v1/535193/$metadata", ("535193", "$metadata")),
        # Percent-encoding is decoded once; what is invalid or cannot be printed stays.
        ("/api/v1/%35%33%35193/crm/%41ccounts", ACCOUNTS),
        ("/api/v1/535193/crm%2FAccounts", ACCOUNTS),
        ("/api/v1/535193/crm%5cAccounts", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts%3Fx%3D1", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts%23x", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts%3Bx=1", ACCOUNTS),
        ("/api/v1/535193/crm/Caf%C3%A9s", ("535193", "crm/Caf\u00e9s")),
        ("/api/v1/535193/crm/%2541ccounts", ("535193", "crm/%2541ccounts")),
        ("/api/v1/535193/crm/100%", ("535193", "crm/100%25")),
        ("/api/v1/535193/crm/%zz%c3%28%0a", ("535193", "crm/%25zz%C3")),
        ("/api/v1/535193/crm/%c0%af%0A%00", ("535193", "crm/%C0%AF%0A%00")),
        # Slashes, path parameters and dots.
        ("//api//v1/535193///crm/Accounts//", ACCOUNTS),
        (r"\api\v1\535193\crm\Accounts", ACCOUNTS),
        ("/api/v1;v=1/535193;x/crm;y=1;z/Accounts;x=1", ACCOUNTS),
        ("/api/v1/./535193/x/../crm/y/z/../../Accounts", ACCOUNTS),
        ("/../../api/v1/535193/crm/%2E%2e/.%2e/535193/crm/Accounts", ACCOUNTS),
        ("/api/v1/535193/crm/x/..;a=1/%20Accounts.%20", ACCOUNTS),
        ("/api/v1/535193/crm/Accounts(guid'1')/../Contacts", ("535193", "crm/Contacts")),
        ("/api/v1/535193/crm/Accounts('%2F..%2F..%2Fx')", ACCOUNTS),
        (f"/api/v1/535193/{'x/../' * 380}crm/Accounts", ACCOUNTS),
        # The paths of domain.md.
        ("/API/V1/535193/crm/Accounts", ACCOUNTS),
        ("/api/v1/beta/535193/crm/Accounts", ACCOUNTS),
        ("/api/v1/535193", ("535193", "")),
        ("/api/v1/535193/", ("535193", "")),
        ("/api/v1/beta/535193/", ("535193", "")),
        ("/api/v1/535193/bulk/crm/Accounts", ("535193", "bulk/crm/Accounts")),
        ("/api/v1/535193/sync/crm/Accounts", ("535193", "sync/crm/Accounts")),
        ("/api/v1/current/Me?Division=1", ("", "current/Me")),
        ("/api/oauth2/token", ("", "api/oauth2/token")),
        ("/docs/XMLUpload.aspx?Topic=Items&_Division_=535193", ("535193", "docs/XMLUpload.aspx")),
        ("/docs/XMLDownload.aspx?division=535193&x=1", ("535193", "docs/XMLDownload.aspx")),
        (
            "/docs/XMLUpload.aspx?Division=1&_division_=%35&_Division_=7",
            ("5", "docs/XMLUpload.aspx"),
        ),
        ("/docs/XMLUpload.aspx?Division=%0A", ("", "docs/XMLUpload.aspx")),
    ],
)
def test_a_call_is_placed(url: str, place: tuple[str, str]) -> None:
    """Each way to spell a call gives the same division and endpoint."""
    assert EXACT.place(url) == place


def mixed(text: str) -> st.SearchStrategy[str]:
    """Draw a text in any case."""
    return st.tuples(*(st.sampled_from((one.lower(), one.upper())) for one in text)).map("".join)


@st.composite
def encoded(draw: st.DrawFn, text: str) -> str:
    """Draw a spelling of a segment: any case, any characters percent-encoded."""
    ways = (str, str, lambda one: f"%{ord(one):02X}", lambda one: f"%{ord(one):02x}")
    spelled = draw(mixed(text))
    return "".join(draw(st.sampled_from(ways))(one) for one in spelled)


HOSTS = ("", "https://start.exactonline.nl", "HTTP://a:b@10.0.0.1:8080", "https://gw.example/exact")
SLASHES = st.sampled_from(["/", "/", "//", "/./", "/%2e/", "/x/../", "/x/%2E%2e/", ";a=1/", "%2F"])
AFTER = (
    "",
    "/",
    "(guid'1-2')",
    "(1)/Contacts",
    "%28'x%2Fy'%29",
    "/$count",
    "/%24value",
    ";x=1",
    ".",
)
QUERY = ("$filter=a", "$top=5", "x=/api/v1/9/crm/Other", "access_token=secret")


@st.composite
def spellings(draw: st.DrawFn) -> str:
    """Draw a spelling of one call."""
    segments = [draw(encoded(one)) for one in ("api", "v1", "535193", "crm", "Accounts")]
    url = draw(st.sampled_from(HOSTS)) + "".join("/" + one for one in segments[:1])
    url += "".join(draw(SLASHES) + one for one in segments[1:]) + draw(st.sampled_from(AFTER))
    query = draw(st.lists(st.sampled_from(QUERY), unique=True).flatmap(st.permutations))
    return f"{url}?{'&'.join(query)}" if query else url


@given(spellings())
def test_all_spellings_of_a_call_are_one_place(url: str) -> None:
    """Case, encoding, slashes, dots, keys, the query and the host make no other place."""
    division, endpoint = EXACT.place(url)
    assert (division, folded(endpoint)) == ("535193", "crm/accounts")


@given(st.permutations(["_Division_=7", "Division=8", "Topic=Items"]), mixed("_division_="))
def test_the_order_of_a_query_makes_no_other_place(query: list[str], name: str) -> None:
    """The first name of the policy that is there counts, wherever it stands."""
    text = "&".join(query).replace("_Division_=", name)
    assert EXACT.place(f"https://x.example/docs/XMLUpload.aspx?{text}") == (
        "7",
        "docs/XMLUpload.aspx",
    )


@given(
    st.text()
    | st.text(st.sampled_from("aA%2fF5cCeE0.;$()/\\?#' :\u00df\u0130\0\ud800"), max_size=80)
)
@example("%2528x")
@example("a" * 199 + "%C3%28")
@example("\u0390" * 200)
@example("x" * 198 + "/..")
def test_a_normal_form_stays(text: str) -> None:
    """The normal form of a normal form is itself, with and without case, printable and short."""
    once = normal_endpoint(text)
    assert normal_endpoint(once) == once
    assert folded(normal_endpoint(folded(once))) == folded(once)
    assert len(once) <= MOST_ENDPOINT_CHARACTERS
    assert len(folded(once)) <= MOST_ENDPOINT_CHARACTERS
    assert once.isprintable()


@given(
    st.text(
        st.characters(exclude_categories=["C", "Z"], exclude_characters="/\\.;?#($"), min_size=1
    )
)
def test_an_encoded_segment_is_the_plain_one(segment: str) -> None:
    """Percent-encoding of UTF-8 changes no endpoint."""
    assert normal_endpoint(f"crm/{quote(segment, safe='')}") == normal_endpoint(
        "crm/" + segment.replace("%", "%25")
    )


def test_a_client_finds_what_the_coordinator_finds() -> None:
    """The policy that a client gets has all that a place needs."""
    message = policy_message(EXACT)
    for url in (
        "/docs/XMLUpload.aspx?_Division_=7",
        "/api/v1/7/crm/Accounts",
        "/api/v1/current/Me",
    ):
        assert find_place(message.endpoint_path, url, message.division_query) == EXACT.place(url)


def test_a_run_counts_what_the_coordinator_counts() -> None:
    """The wrapper's own count compares endpoints without case."""
    rooms = Rooms(policy_message(EXACT))
    division, endpoint = ACCOUNTS
    where = budget_pb2.Scope(division=division, endpoint=endpoint)
    rooms.refill([lease_service_pb2.ScopeRoom(scope=where, room=2)])
    assert not rooms.take((division, "CRM/accounts"), 400, 1)
    assert rooms.take((division, "crm/ACCOUNTS"), 404, 1) == "errors"
