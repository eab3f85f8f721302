"""Lets any Hydra application write ``callbacks=approx_dropout``. Every application imports it: no torch in here."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class ApproxDropoutSearchPath(SearchPathPlugin):
    """Appends the configs that the package ships, so that the application's own come first."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append ``approxdrop_lightning/conf``."""
        search_path.append("approxdrop-lightning", "pkg://approxdrop_lightning.conf")
