"""Objects under one prefix of an S3 bucket, with errors that say what to do.

boto3 is imported when a bucket is first used. It reads the usual AWS_* variables and files (AWS_ENDPOINT_URL names a
server other than Amazon's, AWS_PROFILE a profile) and repeats what failed for a moment (AWS_RETRY_MODE,
AWS_MAX_ATTEMPTS).
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from spec.store.segment import StoreError

CONNECTIONS = 32
_TIMEOUTS = {"connect_timeout": 10, "read_timeout": 60}
_HINTS = {
    "NoSuchBucket": "there is no such bucket; make it, or correct features.store (AWS_ENDPOINT_URL names the server)",
    "AccessDenied": "the credentials do not allow that",
    "InvalidAccessKeyId": "the server does not know the access key; check AWS_ACCESS_KEY_ID or AWS_PROFILE",
    "SignatureDoesNotMatch": "the secret key is not the access key's; check AWS_SECRET_ACCESS_KEY or AWS_PROFILE",
    "ExpiredToken": "the session's token has expired; log in again",
}
_NO_CREDENTIALS = "no credentials were found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"

OnBytes = Callable[[int], object]


class RemoteError(StoreError):
    """The bucket cannot be used: says what was tried, what the server answered, and what to do."""


@dataclass(frozen=True)
class Stored:
    """An object: bytes, and seconds since the epoch when it was written."""

    size: int
    modified: float


class Bucket:
    """The objects under s3://BUCKET/PREFIX, by their names below the prefix.

    Making one connects to nothing. Every method raises RemoteError when the server refuses or is not reached.
    """

    def __init__(self, url: str) -> None:
        self._bucket, _, prefix = url.removeprefix("s3://").partition("/")
        self._prefix = "".join(f"{part}/" for part in prefix.split("/") if part)
        self.url = f"s3://{self._bucket}/{self._prefix}".rstrip("/")

    def objects(self, under: str) -> dict[str, Stored]:
        """The objects whose names begin with this, in order."""
        with self._clear("list"):
            pages = self._s3.get_paginator("list_objects_v2").paginate(**self._under(under))
            return {
                entry["Key"].removeprefix(self._prefix): Stored(entry["Size"], entry["LastModified"].timestamp())
                for page in pages
                for entry in page.get("Contents", ())
            }

    def folders(self) -> list[str]:
        """The names directly under the prefix that have objects below them."""
        with self._clear("list"):
            pages = self._s3.get_paginator("list_objects_v2").paginate(**self._under(""), Delimiter="/")
            found = [entry["Prefix"] for page in pages for entry in page.get("CommonPrefixes", ())]
        return [name.removeprefix(self._prefix).rstrip("/") for name in found]

    def get(self, name: str, first: int | None = None) -> bytes | None:
        """An object (its `first` bytes, or all); None where there is none."""
        part = {} if first is None else {"Range": f"bytes=0-{first - 1}"}
        with self._clear(f"read {name}"):
            try:
                content: bytes = self._s3.get_object(**self._at(name), **part)["Body"].read()
            except self._boto.client_error as error:
                if _code(error) == "InvalidRange":  # it is empty
                    return b""
                if _code(error) == "NoSuchKey":
                    return None
                raise
            return content

    def put(self, name: str, content: bytes, only_new: bool = False) -> None:
        """Write a small object; with `only_new` an object that is there already stays."""
        with self._clear(f"write {name}"):
            if not only_new:
                self._s3.put_object(**self._at(name), Body=content)
                return
            try:
                self._s3.put_object(**self._at(name), Body=content, IfNoneMatch="*")
            except self._boto.client_error as error:
                if _code(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
                    raise

    def upload(self, name: str, file: IO[bytes], on_bytes: OnBytes) -> None:
        """Write an object from a file: nobody sees it before all of it is there.

        Args:
            name: of the object.
            file: read from its position.
            on_bytes: called with the bytes just sent, on any thread; what it raises stops the upload.
        """
        with self._clear(f"write {name}"):
            self._s3.upload_fileobj(file, **self._at(name), Callback=on_bytes, Config=self._boto.transfer)

    def download(self, name: str, file: IO[bytes], on_bytes: OnBytes) -> None:
        """Copy an object into a file."""
        with self._clear(f"read {name}"):
            self._s3.download_fileobj(**self._at(name), Fileobj=file, Callback=on_bytes, Config=self._boto.transfer)

    def move(self, name: str, target: str) -> None:
        """Give an object another name."""
        with self._clear(f"move {name}"):
            self._s3.copy(self._at(name), **self._at(target), Config=self._boto.transfer)
            self._s3.delete_object(**self._at(name))

    def remove(self, under: str, unwanted: Callable[[str, bool], bool]) -> None:
        """Remove objects for good: in a bucket with versions, their versions and delete markers too.

        Args:
            under: names begin with this.
            unwanted: whether to remove a version, given the object's name and whether it is the one that is seen.

        Raises:
            RemoteError: also where some of them could not be removed.
        """
        with self._clear(f"remove objects under {under}"):
            try:
                pages = list(self._s3.get_paginator("list_object_versions").paginate(**self._under(under)))
                kinds = ("Versions", "DeleteMarkers")
                found = [entry for page in pages for kind in kinds for entry in page.get(kind, ())]
            except self._boto.client_error as error:
                if _code(error) not in ("NotImplemented", "MethodNotAllowed"):
                    raise
                found = [{"Key": self._prefix + name, "IsLatest": True} for name in self.objects(under)]
            gone = [entry for entry in found if unwanted(entry["Key"].removeprefix(self._prefix), entry["IsLatest"])]
            gone.sort(key=lambda entry: entry["IsLatest"])  # or an old version would be seen again for a moment
            for start in range(0, len(gone), 1000):
                some = [
                    {key: entry[key] for key in ("Key", "VersionId") if key in entry}
                    for entry in gone[start : start + 1000]
                ]
                answer = self._s3.delete_objects(Bucket=self._bucket, Delete={"Objects": some, "Quiet": True})
                for refused in answer.get("Errors", ()):
                    raise RemoteError(f"{self.url}: could not remove {refused['Key']} ({refused['Message']})")

    def abort_uploads(self, before: float) -> None:
        """Remove what killed clients sent of objects that they never completed.

        Args:
            before: seconds since the epoch; uploads that began later may still be running.
        """
        with self._clear("list unfinished uploads"):
            pages = self._s3.get_paginator("list_multipart_uploads").paginate(**self._under(""))
            for entry in [entry for page in pages for entry in page.get("Uploads", ())]:
                if entry["Initiated"].timestamp() <= before:
                    self._s3.abort_multipart_upload(Bucket=self._bucket, Key=entry["Key"], UploadId=entry["UploadId"])

    def _at(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": self._prefix + name}

    def _under(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Prefix": self._prefix + name}

    @functools.cached_property
    def _boto(self) -> _Boto:
        return _Boto.load()

    @functools.cached_property
    def _s3(self) -> Any:
        try:
            return self._boto.client()
        except ValueError as error:
            raise RemoteError(f"{self.url}: {error}; check AWS_ENDPOINT_URL") from None

    @contextlib.contextmanager
    def _clear(self, what: str) -> Iterator[None]:
        """Turn the client's errors into one that says what to do."""
        boto = self._boto
        try:
            yield
        except boto.no_credentials as error:
            raise RemoteError(f"{self.url}: {_NO_CREDENTIALS} ({error})") from error
        except boto.client_error as error:
            hint = _HINTS.get(_code(error), "see the server's answer")
            raise RemoteError(f"{self.url}: could not {what}: {hint} ({error})") from error
        except boto.errors as error:
            raise RemoteError(
                f"{self.url}: could not {what} ({error}); is the network up, and AWS_ENDPOINT_URL the right server? "
                "Run the same command again: nothing that is done is lost"
            ) from error


@dataclass(frozen=True)
class _Boto:
    """What is used of boto3."""

    client: Callable[[], Any]
    transfer: Any
    client_error: type[Exception]
    no_credentials: tuple[type[Exception], ...]
    errors: tuple[type[Exception], ...]

    @classmethod
    def load(cls) -> _Boto:
        """Import boto3.

        Raises:
            RemoteError: it is not installed.
        """
        try:
            import boto3
            import s3transfer.exceptions
            from boto3.exceptions import Boto3Error
            from boto3.s3.transfer import TransferConfig
            from botocore import exceptions
            from botocore.config import Config
        except ImportError as error:
            raise RemoteError(f"a store on S3 needs boto3 ({error}): pip install '.[s3]'") from None
        config = Config(max_pool_connections=CONNECTIONS, **_TIMEOUTS)
        return cls(
            client=lambda: boto3.session.Session().client("s3", config=config),
            transfer=TransferConfig(max_concurrency=4),
            client_error=exceptions.ClientError,
            no_credentials=(exceptions.NoCredentialsError, exceptions.PartialCredentialsError),
            errors=(exceptions.BotoCoreError, Boto3Error, s3transfer.exceptions.RetriesExceededError),
        )


def _code(error: Any) -> str:
    code: str = error.response.get("Error", {}).get("Code", "")
    return code
