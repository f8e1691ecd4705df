"""The simulated REST and XML API, with time handed in: admission, entities, refusals."""

from __future__ import annotations

import json
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from holdoff.simulator import Provider, Rule, Seed
from holdoff.simulator.api import Request
from holdoff.simulator.limits import (
    ACCESS_TOKEN_LIFE_MS,
    CALLS_PER_MINUTE,
    DAY_MS,
    PAGE_SIZE,
)
from holdoff.simulator.oauth import TokenForm
from holdoff.simulator.paths import locate
from holdoff.simulator.resources import RESOURCES
from holdoff.simulator.store import Store, StoreFullError

START_MS = 20_000 * DAY_MS
JSON = "application/json"
BASE = "https://start.exactonline.nl"
GUID = "guid'5b3debef-9b1c-4bcd-b7ae-003e8d4139df'"
ATOM = {
    "a": "http://www.w3.org/2005/Atom",
    "d": "http://schemas.microsoft.com/ado/2007/08/dataservices",
    "m": "http://schemas.microsoft.com/ado/2007/08/dataservices/metadata",
}


class Client:
    """A client with an access token."""

    def __init__(self, seed: Seed | None = None) -> None:
        self.seed = seed or Seed()
        self.provider = Provider([self.seed], start_ms=START_MS)
        form = TokenForm(
            "refresh_token",
            self.seed.client_id,
            self.seed.client_secret,
            self.seed.refresh_token,
        )
        answer: Any = self.provider.token(form, "job", START_MS)
        self.provider.sent(answer, START_MS)
        self.bearer = str(answer.body["access_token"])

    def send(self, path: str, *, document: Any = None, **more: Any) -> Any:
        """Call a path of `/api/v1/`, or another one that begins with a slash."""
        path, _, query = path.partition("?")
        path = path if path.startswith("/") else f"/api/v1/{path}"
        fields: dict[str, Any] = {
            "bearer": self.bearer,
            "accept": JSON,
            "query": tuple(tuple(one.partition("=")[::2]) for one in query.split("&") if one),
        }
        if document is not None:
            fields |= {"body": json.dumps(document).encode(), "content_type": JSON}
        return self.provider.call(Request(path, **{**fields, **more}), START_MS)

    def errors(self) -> dict[tuple[str, str], int]:
        """Count the errors by division and endpoint."""
        report: Any = self.provider.report(START_MS)
        return {(e["division"], e["endpoint"]): e["total"] for e in report["errors"]}


@pytest.fixture
def client() -> Client:
    """A client of the default app."""
    return Client()


ACCOUNTS = "535193/crm/Accounts"


@pytest.mark.parametrize(
    ("path", "division", "endpoint"),
    [
        ("/api/v1/535193/crm/Accounts", "535193", "crm/Accounts"),
        ("//API/V1//535193/CRM//accounts/", "535193", "crm/Accounts"),
        ("/api/v1/535193/%63rm/Accounts%28guid'x'%29", "535193", "crm/Accounts"),
        ("/api/v1/535193/crm;x=1/Accounts(guid'x')/Contacts", "535193", "crm/Accounts"),
        ("/api/v1/535193/crm/Accounts/$count", "535193", "crm/Accounts"),
        ("/api/v1/beta/535193/crm/Accounts", "535193", "crm/Accounts"),
        ("/api/v1/535193/bulk/crm/accounts", "535193", "bulk/CRM/Accounts"),
        ("/api/v1/535193/sync/CRM/Accounts", "535193", "sync/CRM/Accounts"),
        ("/api/v1/current/me", "", "current/Me"),
        ("/api/v1/1/system/divisions", "1", "system/Divisions"),
        ("/api/v1/535193/Some/Thing", "535193", "Some/Thing"),
        ("/docs/XMLUpload.aspx", "", "docs/XMLUpload.aspx"),
    ],
)
def test_a_path_has_one_place(path: str, division: str, endpoint: str) -> None:
    """Other spellings, keys, a count and `beta` make no other endpoint."""
    place = locate(path, {})
    assert place is not None
    assert (place.division, place.endpoint) == (division, endpoint)


@pytest.mark.parametrize("path", ["/", "/api/v1", "/api/v2/1/crm/Accounts", "/docs/Other.aspx"])
def test_elsewhere_is_no_api(path: str, client: Client) -> None:
    """Another path is answered with 404, and no error is counted."""
    assert locate(path, {}) is None
    assert client.send(path).status == 404
    assert client.errors() == {}


@pytest.mark.parametrize("name", ["_Division_", "Division", "division"])
def test_xml_takes_its_division_from_the_query(name: str) -> None:
    """Either parameter names the division."""
    place = locate("/docs/xmldownload.aspx", {"Topic": "Items", name: "7"})
    assert place is not None
    assert (place.division, place.endpoint) == ("7", "docs/XMLDownload.aspx")


def test_errors_of_all_spellings_count_together(client: Client) -> None:
    """Keys, a count, case and `beta` are errors of one endpoint, also of one that is missing.

    Fails when another spelling gets ten errors of its own.
    """
    for path in (
        f"{ACCOUNTS}({GUID})",
        "535193//CRM/accounts(nonsense)",
        "beta/535193/crm/Accounts?$top=x",
        f"{ACCOUNTS}/$count?$filter=x eq",
    ):
        assert client.send(path).status in (400, 404)
    assert client.send("535193/hrm/Nothing").status == 404
    assert client.send("535193/HRM/nothing").status == 404
    assert client.errors() == {("535193", "crm/Accounts"): 4, ("535193", "hrm/Nothing"): 2}


def test_an_entity_lives_from_post_to_delete(client: Client) -> None:
    """201 with the entity and its address, 200, 204 without a body, and 404 after its end."""
    created = client.send(ACCOUNTS, method="POST", document={"Name": "A & B", "Status": "C"})
    assert created.status == 201
    entity = created.body["d"]
    address = created.headers["Location"]
    assert address == f"{BASE}/api/v1/{ACCOUNTS}(guid'{entity['ID']}')"
    assert (entity["Name"], entity["Division"]) == ("A & B", 535193)
    assert entity["__metadata"]["uri"] == address

    path = address.removeprefix(BASE)
    changed = client.send(path, method="PUT", document={"Name": "C", "ID": "another"})
    assert (changed.status, changed.body) == (204, "")
    read = client.send(path).body["d"]
    assert (read["Name"], read["Status"], read["ID"]) == ("C", "C", entity["ID"])
    found = client.send(f"{ACCOUNTS}?$filter=ID eq guid'{entity['ID']}'&$select=Name")
    [row] = found.body["d"]["results"]
    assert row == {"__metadata": read["__metadata"], "Name": "C"}

    deleted = client.send(path, method="DELETE")
    assert (deleted.status, deleted.body) == (204, "")
    assert client.send(path).status == 404
    for method in ("PUT", "DELETE"):
        assert client.send(path, method=method, document={}).status == 404
    assert client.errors() == {("535193", "crm/Accounts"): 3}


def test_what_follows_a_key_does_not_exist(client: Client) -> None:
    """An entity has no navigation properties; a call of one is an error of its endpoint."""
    [entity] = client.send(f"{ACCOUNTS}?$top=1").body["d"]
    key = f"{ACCOUNTS}(guid'{entity['ID']}')"
    assert client.send(key).status == 200
    for path in (f"{key}/Contacts", f"{key}/$count", f"{key}x"):
        assert client.send(path).status == 404
    assert client.errors() == {("535193", "crm/Accounts"): 3}


def test_companies_have_entities_of_their_own(client: Client) -> None:
    """What is created in one company is not in another."""
    assert client.send(ACCOUNTS, method="POST", document={"Name": "x"}).status == 201
    counts = [client.send(f"{one}/crm/Accounts/$count").body for one in (535193, 535194)]
    assert int(counts[0]) == int(counts[1]) + 1


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("PUT", ACCOUNTS, "GET, POST"),
        ("DELETE", ACCOUNTS, "GET, POST"),
        ("HEAD", ACCOUNTS, "GET, POST"),
        ("POST", f"{ACCOUNTS}({GUID})", "GET, PUT, DELETE"),
        ("PATCH", f"{ACCOUNTS}({GUID})", "GET, PUT, DELETE"),
        ("POST", f"{ACCOUNTS}/$count", "GET"),
        ("POST", "535193/bulk/CRM/Accounts", "GET"),
        ("POST", "535193/financialtransaction/TransactionLines", "GET"),
        ("POST", "current/Me", "GET"),
        ("GET", "/docs/XMLUpload.aspx?Topic=Items", "POST"),
        ("POST", "/docs/XMLDownload.aspx?Topic=Items", "GET"),
    ],
)
def test_a_method_that_an_endpoint_lacks(
    client: Client, method: str, path: str, allowed: str
) -> None:
    """It gets a 405 with the methods that are allowed, and is not counted as an error."""
    answer = client.send(path, method=method, document={})
    assert (answer.status, answer.headers) == (405, {"Allow": allowed})
    assert client.errors() == {}


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"body": b"{", "content_type": JSON}, "not JSON"),
        ({"body": b"{}", "content_type": "text/plain"}, "media type"),
        ({"body": b"[]", "content_type": JSON}, "JSON object"),
        ({"body": None, "content_type": JSON}, "cannot be read"),
    ],
)
def test_a_wrong_body_gets_an_odata_error(client: Client, more: dict[str, Any], text: str) -> None:
    """A body that cannot be read is a counted 400 in OData's form."""
    answer = client.send(ACCOUNTS, method="POST", **more)
    assert answer.status == 400
    assert text in answer.body["error"]["message"]["value"]
    assert client.errors() == {("535193", "crm/Accounts"): 1}


@pytest.mark.parametrize(
    ("path", "size"),
    [
        (ACCOUNTS, PAGE_SIZE),
        ("535193/bulk/Financial/TransactionLines", 1000),
        ("535193/sync/Financial/TransactionLines", 1000),
    ],
)
def test_next_links_lead_through_all_pages(client: Client, path: str, size: int) -> None:
    """Each page is full but the last, each link absolute, and no entity comes twice."""
    seen: list[str] = []
    origin = "http://host:1"
    url = f"{origin}/api/v1/{path}?$select=ID"
    while url:
        page = client.send(url.removeprefix(origin), origin=origin).body["d"]
        seen += [row["ID"] for row in page["results"]]
        url = page.get("__next", "")
        assert url.startswith(f"{origin}/api/v1/{path}?$select=ID&$skiptoken=") or not url
        assert len(page["results"]) == size or not url
    assert len(seen) == len(set(seen)) > 2 * size


@pytest.mark.parametrize(
    ("query", "status"),
    [("", 400), ("$top=2", 400), ("$skip=1", 400), ("$top=1", 200), ("$select=*", 200)],
)
def test_bulk_endpoints_need_a_selection(client: Client, query: str, status: int) -> None:
    """A list of a bulk endpoint without `$select` or `$top=1` is a counted 400."""
    answer = client.send(f"535193/bulk/CRM/Contacts?{query}")
    assert answer.status == status
    text = "Please add a $select or a $top=1 statement to the query string."
    assert (text in str(answer.body)) == (status == 400)
    assert len(client.errors()) == (status == 400)
    assert client.send("535193/bulk/CRM/Contacts/$count").status == 200


def test_sync_lists_changes_by_their_timestamps(client: Client) -> None:
    """A client that knows a timestamp gets what changed since, the latest last.

    Fails when the timestamps, of 64 bits, are no strings in JSON as OData version 2 has them.
    """
    path = "535193/sync/CRM/Accounts"
    rows = [*client.send(path).body["d"]["results"]]
    assert [row["Timestamp"] for row in rows] == [str(n + 1) for n in range(len(rows))]
    changed = rows[3]["ID"]
    assert client.send(f"{ACCOUNTS}(guid'{changed}')", method="PUT", document={}).status == 204
    later = client.send(f"{path}?$filter=Timestamp gt {len(rows)}L").body["d"]["results"]
    assert [row["ID"] for row in later] == [changed]


def test_a_client_sets_no_timestamp(client: Client) -> None:
    """A field of that name in what a client writes does not change the order of the changes.

    Fails when the field replaces the number that the download is sorted by.
    """
    fields = {"Timestamp": "none", "Code": ["nested"], "Division": 7}
    assert client.send(ACCOUNTS, method="POST", document=fields).status == 201
    path = "/docs/XMLDownload.aspx?Topic=Accounts&TSPaging=0x96"
    assert 'count="1"' in client.send(path).body
    [row] = client.send("535193/sync/CRM/Accounts?$filter=Timestamp gt 150").body["d"]["results"]
    assert (row["Timestamp"], row["Division"]) == ("151", 535193)


def test_a_list_that_its_client_limits_has_no_results(client: Client) -> None:
    """With `$top` up to a page, `d` is the list itself, but for one with a total."""
    assert len(client.send(f"{ACCOUNTS}?$top=2").body["d"]) == 2
    total = client.send(f"{ACCOUNTS}?$top=2&$inlinecount=allpages").body["d"]
    assert (len(total["results"]), total["__count"]) == (2, "150")
    long = client.send(f"{ACCOUNTS}?$top=70").body["d"]
    assert len(long["results"]) == PAGE_SIZE
    rest = client.send(long["__next"].removeprefix(BASE)).body["d"]
    assert len(rest["results"]) == 10
    assert client.send(f"{ACCOUNTS}/$count").body == "150"
    assert client.send(f"{ACCOUNTS}?$filter=Name eq 'none'").body == {"d": {"results": []}}


def test_atom_is_the_default(client: Client) -> None:
    """Without an Accept for JSON a list is an Atom feed, and an error is XML."""
    answer = client.send(f"{ACCOUNTS}?$inlinecount=allpages", accept="*/*")
    assert answer.content_type.startswith("application/atom+xml")
    feed = ET.fromstring(answer.body)  # noqa: S314 -- our own
    entries = feed.findall("a:entry", ATOM)
    assert len(entries) == PAGE_SIZE
    assert feed.findtext("m:count", namespaces=ATOM) == "150"
    link = feed.find("a:link[@rel='next']", ATOM)
    assert link is not None
    assert "$skiptoken=guid'" in link.attrib["href"]
    name = entries[0].find("a:content/m:properties/d:Name", ATOM)
    assert name is not None
    modified = entries[0].find("a:content/m:properties/d:Modified", ATOM)
    assert modified is not None
    assert modified.attrib[f"{{{ATOM['m']}}}type"] == "Edm.DateTime"

    error = ET.fromstring(client.send("535193/x/Y", accept="").body)  # noqa: S314 -- our own
    assert error.tag == f"{{{ATOM['m']}}}error"


@pytest.mark.parametrize(
    ("accept", "query", "json_wanted"),
    [
        ("application/json;odata=verbose", "", True),
        ("application/json, text/plain, */*", "", True),
        ("application/atom+xml, application/json", "", False),
        ("*/*", "$format=json", True),
        (JSON, "$format=atom", False),
        ("", "", False),
    ],
)
def test_a_client_chooses_the_format(
    client: Client, accept: str, query: str, *, json_wanted: bool
) -> None:
    """By what Accept names first, or by `$format`."""
    body = client.send(f"{ACCOUNTS}?{query}", accept=accept).body
    assert isinstance(body, dict) is json_wanted


def test_what_a_client_wrote_is_valid_in_atom(client: Client) -> None:
    """Markup, control characters, nested values and nulls leave the feed valid."""
    fields = {"Name": "<&\x01\ud800", "Lines": [{"a": 1}], "Big": 1 << 60, "Nothing": None}
    created = client.send(ACCOUNTS, method="POST", document=fields, accept="*/*")
    entry = ET.fromstring(created.body)  # noqa: S314 -- our own
    assert entry.findtext("a:content/m:properties/d:Name", namespaces=ATOM) == "<&??"


def test_me_and_divisions(client: Client) -> None:
    """A client finds its user, and its companies below whichever company it names."""
    [me] = client.send("current/Me?$select=CurrentDivision").body["d"]["results"]
    assert me["CurrentDivision"] == 535193
    for path in ("1/system/Divisions", "535193/hrm/Divisions"):
        rows = client.send(f"{path}?$select=Code,Description").body["d"]["results"]
        assert [row["Code"] for row in rows] == [535193, 535194]
    assert client.send("535193/system/Divisions(535194)").body["d"]["Code"] == 535194
    assert client.send("535193/current/Me").status == 404


def test_the_code_of_an_account_has_18_characters(client: Client) -> None:
    """It is padded, also what a client wrote; a filter finds it by all of them, or trimmed."""
    created = client.send(ACCOUNTS, method="POST", document={"Code": "9001"})
    assert created.body["d"]["Code"] == "              9001"
    for text in ("Code eq '              9001'", "trim(Code) eq '9001'"):
        [row] = client.send(f"{ACCOUNTS}?$filter={text}").body["d"]["results"]
        assert row["ID"] == created.body["d"]["ID"]
    items = client.send("535193/logistics/Items?$filter=Code eq '1'").body["d"]["results"]
    assert len(items) == 1


@pytest.mark.parametrize("path", sorted(RESOURCES))
def test_every_endpoint_answers(client: Client, path: str) -> None:
    """Each has entities that are found by their keys, in either format."""
    place = path if path.startswith("current") else f"535193/{path}"
    listed = client.send(f"{place}?$select=*&$inlinecount=allpages").body["d"]["results"]
    key = RESOURCES[path].key
    value = listed[-1][key]
    written = str(value) if isinstance(value, int) else f"guid'{value}'"
    found = client.send(f"{place}({written})")
    assert found.body["d"][key] == value
    ET.fromstring(client.send(f"{place}?$select=*", accept="").body)  # noqa: S314 -- our own


def test_a_service_describes_its_endpoints(client: Client) -> None:
    """`$metadata` has a type and a set for each endpoint; another service does not exist."""
    answer = client.send("535193/CRM/$metadata")
    assert (answer.status, answer.content_type) == (200, "application/xml")
    edm = "{http://schemas.microsoft.com/ado/2008/09/edm}"
    document = ET.fromstring(answer.body)  # noqa: S314 -- our own
    sets = {
        one.attrib["Name"]: one.attrib["EntityType"] for one in document.iter(f"{edm}EntitySet")
    }
    assert sets["Accounts"] == "Exact.Web.Api.Models.Account"
    assert sets["Addresses"] == "Exact.Web.Api.Models.Address"
    types = {
        f"Exact.Web.Api.Models.{one.attrib['Name']}" for one in document.iter(f"{edm}EntityType")
    }
    assert types == set(sets.values())
    for path in ("535193/none/$metadata", "535193/crm/Accounts/$metadata"):
        assert client.send(path).status == 404


def test_refusals_for_a_company() -> None:
    """Another's company, and one whose licence expired, get a counted 403 with the reason."""
    client = Client(Seed(expired_divisions=(535194,)))
    for division, reason in (("999", "NoDivisionAccess"), ("535194", "LicenseExpired")):
        answer = client.send(f"{division}/crm/Accounts")
        assert (answer.status, answer.headers) == (403, {"Reason": reason})
        assert answer.body["error"]["message"]["value"].startswith("Forbidden - ")
    assert client.send(ACCOUNTS).status == 200
    assert client.send("/docs/XMLDownload.aspx?Topic=Items&Division=999").status == 403
    assert client.errors() == {
        ("999", "crm/Accounts"): 1,
        ("535194", "crm/Accounts"): 1,
        ("999", "docs/XMLDownload.aspx"): 1,
    }


def test_refusals_for_a_scope() -> None:
    """A missing permission gets a counted 403 that names it; reading needs less than writing."""
    client = Client(Seed(scopes=("crm.accounts:read", "logistics.items")))
    refused = client.send("535193/salesorder/SalesOrders")
    assert refused.status == 403
    assert refused.body["error"]["message"]["value"] == (
        "Forbidden - Application Scope Violated. Cannot read 'sales.orders' scope."
    )
    assert client.send(ACCOUNTS).status == 200
    assert client.send(ACCOUNTS, method="POST", document={}).status == 403
    assert client.send("535193/logistics/Items", method="POST", document={}).status == 201
    assert client.send("/docs/XMLDownload.aspx?Topic=Invoices").status == 403
    assert client.send("current/Me").status == 200
    assert sum(client.errors().values()) == 3


@pytest.mark.parametrize(
    "more",
    [{"bearer": ""}, {"bearer": "made-up"}, {"bearer": "", "query": (("access_token", "x"),)}],
)
def test_without_a_token_nothing_is_answered(client: Client, more: dict[str, Any]) -> None:
    """A call without the header gets a 401, also one with the token in the query."""
    if "query" in more:
        more["query"] = (("access_token", client.bearer),)
    for path in (ACCOUNTS, "/docs/XMLDownload.aspx?Topic=Items"):
        assert client.send(path, **more).status == 401
    assert client.errors() == {}


def test_errors_carry_no_rate_headers(client: Client) -> None:
    """Answers with data and those to changes have the limits' headers; errors don't.

    Fails when a refusal of an admitted call has them.
    """
    created = client.send(ACCOUNTS, method="POST", document={})
    assert created.headers["X-RateLimit-Minutely-Remaining"] == "59"
    for path in ("535193/x/Y", "999/crm/Accounts", f"{ACCOUNTS}?$top=x"):
        assert not [name for name in client.send(path).headers if "RateLimit" in name]
    # The refused calls were counted, but the one of another's company.
    assert client.send(ACCOUNTS).headers["X-RateLimit-Minutely-Remaining"] == "56"


def test_rest_and_xml_share_the_minute(client: Client) -> None:
    """Calls of both count for one limit of the company."""
    for n in range(CALLS_PER_MINUTE):
        path = f"{ACCOUNTS}/$count" if n % 2 else "/docs/XMLDownload.aspx?Topic=Items"
        assert client.send(path).status == 200
    for path in (ACCOUNTS, "/docs/XMLDownload.aspx?Topic=Items&_Division_=535193"):
        refused = client.send(path)
        assert refused.status == 429
        assert {name for name in refused.headers if "RateLimit" in name} == {
            f"X-RateLimit-Minutely-{one}" for one in ("Limit", "Remaining", "Reset")
        }
    report: Any = client.provider.report(START_MS)
    assert report["totals"]["by_rule"][Rule.CALLS_PER_MINUTE] == 2


def test_an_expired_token_is_an_error_in_the_xml_api_too(client: Client) -> None:
    """It counts for the default company where the query names none."""
    request = Request("/docs/XMLDownload.aspx", client.bearer, query=(("Topic", "Items"),))
    assert client.provider.call(request, START_MS + ACCESS_TOKEN_LIFE_MS).status == 401
    assert client.errors() == {("535193", "docs/XMLDownload.aspx"): 1}


def test_a_download_comes_in_pages(client: Client) -> None:
    """A page that is not full is the last; `ts_d` leads to the next one."""
    codes: list[str] = []
    timestamp, count = "", 100
    while count == 100:
        body = client.send(f"/docs/XMLDownload.aspx?Topic=accounts&TSPaging={timestamp}").body
        document = ET.fromstring(body)  # noqa: S314 -- our own
        topic = document.find("Topics/Topic")
        assert topic is not None
        codes += [one.attrib["code"].strip() for one in document.findall("Accounts/Account")]
        timestamp, count = topic.attrib["ts_d"], int(topic.attrib["count"])
        assert topic.attrib["pagesize"] == "100"
    assert codes == [str(n) for n in range(1, 151)]


def upload(client: Client, body: bytes | None, topic: str = "GLTransactions") -> Any:
    """Upload a document."""
    path = f"/docs/XMLUpload.aspx?Topic={topic}&_Division_=535193"
    return client.send(path, method="POST", body=body, content_type="text/xml")


def test_an_upload_gets_a_message_for_each_entity(client: Client) -> None:
    """The message names the entity by the key that it had in the document."""
    answer = upload(
        client,
        b"<eExact><GLTransactions><GLTransaction entry='60'/><GLTransaction><a/></GLTransaction>"
        b"</GLTransactions><Messages/></eExact>",
    )
    assert (answer.status, answer.content_type) == (200, "text/xml")
    messages = ET.fromstring(answer.body).findall("Messages/Message")  # noqa: S314 -- our own
    keys = [one.find("Topic/Data") for one in messages]
    assert [key.attrib["keyAlt"] for key in keys if key is not None] == ["60", "2"]
    assert {one.attrib["type"] for one in messages} == {"2"}


@pytest.mark.parametrize(
    "body",
    [
        *(b"", b"<eExact>", b"no XML", b"<other/>", b"\xff\xfe", b"<eExact>&x;</eExact>", None),
        b'<!DOCTYPE a [<!ENTITY x "y">]><eExact/>',
        b'<?xml version="1.0" encoding="nonsense"?><eExact/>',
        b"<eExact>" + b"<a>" * 200 + b"</a>" * 200 + b"</eExact>",
        b"<eExact><Items>" + b"<Item/>" * 1001 + b"</Items></eExact>",
    ],
)
def test_a_wrong_document_is_refused(client: Client, body: bytes | None) -> None:
    """It is a counted 400 with an error message in the XML API's form."""
    answer = upload(client, body, "Items")
    assert answer.status == 400
    message = ET.fromstring(answer.body).find("Messages/Message")  # noqa: S314 -- our own
    assert message is not None
    assert message.attrib["type"] == "0"
    assert client.errors() == {("535193", "docs/XMLUpload.aspx"): 1}


@pytest.mark.parametrize(
    "query", ["", "Topic=x", "Topic=Items&TSPaging=xyz", "Topic=Items&TSPaging=-1"]
)
def test_a_wrong_download_is_refused(client: Client, query: str) -> None:
    """An unknown topic and an invalid timestamp get a 400."""
    assert client.send(f"/docs/XMLDownload.aspx?{query}").status == 400


def test_a_store_has_bounds(client: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    """What clients write is bounded in number and bytes; deleting makes room.

    Fails when a change of an entity counts as another one.
    """
    resource = RESOURCES["crm/accounts"]
    store = Store(most_written=2, most_bytes=1_000)
    first = store.create(resource, "1", {"Name": "a"}, START_MS)
    store.create(resource, "2", {"Name": "b"}, START_MS)
    assert store.update(resource, "1", first["ID"], {"Name": "c"}, START_MS)
    with pytest.raises(StoreFullError):
        store.create(resource, "1", {}, START_MS)
    with pytest.raises(StoreFullError):
        store.update(resource, "1", first["ID"], {"Name": "x" * 1_000}, START_MS)
    assert store.delete(resource, "1", first["ID"])
    store.create(resource, "1", {}, START_MS)

    monkeypatch.setattr(Store, "create", _refuse)
    answer = client.send(ACCOUNTS, method="POST", document={})
    assert answer.status == 507
    assert client.errors() == {}


def _refuse(*_: object) -> None:
    raise StoreFullError
