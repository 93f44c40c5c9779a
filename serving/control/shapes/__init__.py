"""Bodies of the admin API, as pydantic models; the OpenAPI document is made from them."""
