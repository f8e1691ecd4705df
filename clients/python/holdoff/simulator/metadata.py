"""The description of a service, such as `crm`, that OData clients read first: `$metadata`.

It has the fields of the generated entities.
"""

from __future__ import annotations

from holdoff.simulator.resources import RESOURCES, Resource

_MODELS = "Exact.Web.Api.Models"
_FIELDS = {
    "Code": "Edm.String",
    "Description": "Edm.String",
    "Name": "Edm.String",
    "Division": "Edm.Int32",
    "Created": "Edm.DateTime",
    "Modified": "Edm.DateTime",
}


def describe(service: str) -> str | None:
    """Describe the endpoints of a service; None if there is none of that name."""
    found = [
        one for one in RESOURCES.values() if one.path.lower().rpartition("/")[0] == service.lower()
    ]
    if not found:
        return None
    sets = "".join(
        f'<EntitySet Name="{_name(one)}" EntityType="{_MODELS}.{one.kind}"/>' for one in found
    )
    return (
        '<?xml version="1.0" encoding="utf-8"?>'
        '<edmx:Edmx Version="1.0" xmlns:edmx="http://schemas.microsoft.com/ado/2007/06/edmx">'
        '<edmx:DataServices m:DataServiceVersion="2.0"'
        ' xmlns:m="http://schemas.microsoft.com/ado/2007/08/dataservices/metadata">'
        f'<Schema Namespace="{_MODELS}" xmlns="http://schemas.microsoft.com/ado/2008/09/edm">'
        f"{''.join(map(_type, found))}"
        f'<EntityContainer Name="Service" m:IsDefaultEntityContainer="true">{sets}'
        "</EntityContainer></Schema></edmx:DataServices></edmx:Edmx>"
    )


def _name(resource: Resource) -> str:
    return resource.path.rpartition("/")[2]


def _type(resource: Resource) -> str:
    key = {resource.key: "Edm.Int32" if resource.key == "Code" else "Edm.Guid"}
    timestamp = {"Timestamp": "Edm.Int64"} if resource.sync else {}
    fields = "".join(
        f'<Property Name="{name}" Type="{kind}" Nullable="{"false" if name in key else "true"}"/>'
        for name, kind in (_FIELDS | key | timestamp).items()
    )
    return (
        f'<EntityType Name="{resource.kind}"><Key><PropertyRef Name="{resource.key}"/></Key>'
        f"{fields}</EntityType>"
    )
