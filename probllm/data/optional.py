"""The error for an embedded data set whose package is not installed."""


def missing_data_package(name: str) -> ImportError:
    """An ImportError that says how to install the packages of the embedded data sets."""
    return ImportError(f"this data set comes with the package {name!r}: pip install 'probllm[data]'", name=name)
