"""Makes ``callbacks=approx_dropout`` available to all Hydra applications, which all import this: keep torch out."""

from hydra.core.config_search_path import ConfigSearchPath
from hydra.plugins.search_path_plugin import SearchPathPlugin


class ApproxDropoutSearchPath(SearchPathPlugin):
    """Appends the configs of the package, so that the application's own take precedence."""

    def manipulate_search_path(self, search_path: ConfigSearchPath) -> None:
        """Append ``approxdrop_lightning/conf``."""
        search_path.append("approxdrop-lightning", "pkg://approxdrop_lightning.conf")
