"""What commands and servers that run in this process would leave behind, or take long over."""

from tests.sim_client.conftest import no_lame_duck, sigterm_as_before  # noqa: F401
