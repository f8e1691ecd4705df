"""What there is in the API: each endpoint, its entities' key, its scope and its methods.

Names and keys: Exact Online REST API, resource overview
(https://start.exactonline.nl/docs/HlpRestAPIResources.aspx).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from holdoff.simulator.limits import BULK_PAGE_SIZE, PAGE_SIZE

READ = ("GET",)
ALL = ("GET", "POST", "PUT", "DELETE")


@dataclass(frozen=True, slots=True)
class Resource:
    """An endpoint."""

    path: str
    """What follows the division in a URL."""
    kind: str
    """Type of an entity."""
    scope: str
    """What an app needs a permission for; empty if it needs none."""
    key: str = "ID"
    methods: tuple[str, ...] = READ
    page_size: int = PAGE_SIZE
    source: str = ""
    """The endpoint whose entities it shows too."""
    sync: bool = False
    """Whether it lists changes, by their timestamps."""

    @property
    def entities(self) -> str:
        """The endpoint whose entities it shows."""
        return self.source or self.path

    @property
    def order(self) -> str:
        """The field by which its entities are sorted and divided into pages."""
        return "Timestamp" if self.sync else self.key


ME = Resource("current/Me", "System.Me", "", key="UserID")
"""The one endpoint that belongs to no company."""
DIVISIONS = Resource("system/Divisions", "System.Division", "", key="Code")

_COMPANY = (
    Resource("crm/Accounts", "CRM.Account", "crm.accounts", methods=ALL),
    Resource("crm/Contacts", "CRM.Contact", "crm.accounts", methods=ALL),
    Resource(
        "financial/GLAccounts", "Financial.GLAccount", "financial.generalledgers", methods=ALL
    ),
    Resource(
        "financialtransaction/TransactionLines",
        "FinancialTransaction.TransactionLine",
        "financial.generalledgers",
    ),
    Resource("logistics/Items", "Logistics.Item", "logistics.items", methods=ALL),
    Resource(
        "salesinvoice/SalesInvoices",
        "SalesInvoice.SalesInvoice",
        "sales.invoices",
        "InvoiceID",
        ALL,
    ),
    Resource("salesorder/SalesOrders", "SalesOrder.SalesOrder", "sales.orders", "OrderID", ALL),
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


def _in_bulk(prefix: str, one: Resource) -> Resource:
    return replace(
        one,
        path=f"{prefix}/{_BULK_NAMES[one.path]}",
        methods=READ,
        page_size=BULK_PAGE_SIZE,
        source=one.path,
        sync=prefix == "sync",
    )


RESOURCES: dict[str, Resource] = {
    one.path.lower(): one
    for one in (
        ME,
        DIVISIONS,
        Resource("hrm/Divisions", "HRM.Division", "", key="Code", source=DIVISIONS.path),
        *_COMPANY,
        *(_in_bulk(prefix, one) for prefix in ("bulk", "sync") for one in _COMPANY),
    )
}
"""All endpoints that exist, by their paths without case."""

SCOPES: tuple[str, ...] = tuple(sorted({one.scope for one in _COMPANY}))
"""Every permission that an app can have."""
