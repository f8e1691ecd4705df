"""What there is in the API: each endpoint, its entities' key, its scope and its methods.

Names and keys: Exact Online REST API, resource overview
(https://start.exactonline.nl/docs/HlpRestAPIResources.aspx).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from holdoff.simulator.limits import BULK_PAGE_SIZE, PAGE_SIZE

if TYPE_CHECKING:
    from collections.abc import Iterator

READ = ("GET",)
ALL = ("GET", "POST", "PUT", "DELETE")


@dataclass(frozen=True, slots=True)
class Resource:
    """An endpoint."""

    path: str
    """What follows the division in a URL."""
    scope: str
    """What an app needs a permission for; empty if it needs none."""
    key: str = "ID"
    methods: tuple[str, ...] = READ
    page_size: int = PAGE_SIZE
    source: str = ""
    """The endpoint whose entities it shows too."""
    sync: bool = False
    """Whether it lists changes, by their timestamps."""
    bulk: bool = False
    """Whether a client must select fields (field)."""

    @property
    def entities(self) -> str:
        """The endpoint whose entities it shows."""
        return self.source or self.path

    @property
    def kind(self) -> str:
        """Type of an entity."""
        name = self.entities.rpartition("/")[2]
        if name.endswith("ies"):
            return f"{name[:-3]}y"
        return name[:-2] if name.endswith("sses") else name.removesuffix("s")

    @property
    def order(self) -> str:
        """The field by which its entities are sorted and divided into pages."""
        return "Timestamp" if self.sync else self.key


ME = Resource("current/Me", "", key="UserID")
"""The one endpoint that belongs to no company."""
DIVISIONS = Resource("system/Divisions", "", key="Code")

_BY_SCOPE = {  # scopes that no report names are named as those that are reported
    "crm.accounts": ("crm/Accounts", "crm/Addresses", "crm/BankAccounts", "crm/Contacts"),
    "crm.quotes": ("crm/Quotations",),
    "financial.costcenters": ("hrm/Costcenters", "hrm/Costunits"),
    "financial.generalledgers": (
        "financial/GLAccounts",
        "financial/Journals",
        "financialtransaction/TransactionLines",
        "vat/VATCodes",
    ),
    "financial.receivables": ("read/financial/ReceivablesList",),
    "logistics.items": ("logistics/Items", "logistics/ItemGroups"),
    "organization.administration": ("users/Users",),
    "organization.documents": ("documents/DocumentAttachments", "documents/Documents"),
    "project.projects": ("project/Projects",),
    "purchase.invoices": ("purchaseentry/PurchaseEntries",),
    "sales.invoices": ("salesentry/SalesEntries", "salesinvoice/SalesInvoices"),
    "sales.orders": ("salesorder/SalesOrders",),
}
_KEYS = {  # if it is not ID
    "crm/Quotations": "QuotationID",
    "purchaseentry/PurchaseEntries": "EntryID",
    "salesentry/SalesEntries": "EntryID",
    "salesinvoice/SalesInvoices": "InvoiceID",
    "salesorder/SalesOrders": "OrderID",
    "users/Users": "UserID",
}
_READ_ONLY = frozenset(
    ("financialtransaction/TransactionLines", "read/financial/ReceivablesList", "users/Users")
)
_BULK_NAMES = {  # of the bulk and sync endpoints
    "crm/Accounts": "CRM/Accounts",
    "crm/Contacts": "CRM/Contacts",
    "financial/GLAccounts": "Financial/GLAccounts",
    "financialtransaction/TransactionLines": "Financial/TransactionLines",
    "logistics/Items": "Logistics/Items",
    "salesinvoice/SalesInvoices": "SalesInvoice/SalesInvoices",
    "salesorder/SalesOrders": "SalesOrder/SalesOrderHeaders",
}


def _of_a_company(path: str, scope: str) -> Iterator[Resource]:
    """An endpoint, and those that show its entities in bulk."""
    one = Resource(path, scope, _KEYS.get(path, "ID"), READ if path in _READ_ONLY else ALL)
    yield one
    if path in _BULK_NAMES:
        for prefix in ("bulk", "sync"):
            yield replace(
                one,
                path=f"{prefix}/{_BULK_NAMES[path]}",
                methods=READ,
                page_size=BULK_PAGE_SIZE,
                source=path,
                sync=prefix == "sync",
                bulk=prefix == "bulk",
            )


RESOURCES: dict[str, Resource] = {
    one.path.lower(): one
    for one in (
        ME,
        DIVISIONS,
        Resource("hrm/Divisions", "", key="Code", source=DIVISIONS.path),
        *(
            one
            for scope in _BY_SCOPE
            for path in _BY_SCOPE[scope]
            for one in _of_a_company(path, scope)
        ),
    )
}
"""All endpoints that exist, by their paths without case."""

SCOPES: tuple[str, ...] = tuple(_BY_SCOPE)
"""Every permission that an app can have."""
