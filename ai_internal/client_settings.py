"""The settings of every client of the service, worker and command line alike.

AI_SERVICE_URL          where the service is: http://127.0.0.1:8080
AI_SERVICE_TOKEN        its token; none
"""

import attrs

from ai_client import check_base_url, check_token
from providers.settings import setting


@attrs.frozen(kw_only=True)
class ClientSettings:
    """Where the service is, and who asks."""

    url: str = setting("AI_SERVICE_URL", "where the service is", default="http://127.0.0.1:8080", read=check_base_url)
    token: str | None = setting("AI_SERVICE_TOKEN", "its token", read=check_token, secret=True)
