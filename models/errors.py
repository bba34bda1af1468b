"""The one error tree of this package. Every message names the file or package and says what to do."""


class ModelBuildError(Exception):
    """A model could not be obtained or built."""


class FetchError(ModelBuildError):
    """A package could not be downloaded, or is not the file its pinned checksum promises."""


class FormatError(ModelBuildError):
    """A downloaded file is damaged, or holds something other than what its format allows."""
