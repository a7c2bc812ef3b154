"""Documents as one model reads them: plain text, text with trained spans, or a conversation in its own template."""

__all__ = ["DocumentEncoder"]

from collections.abc import Sequence

from fusejax.data.chat import ChatTemplate
from fusejax.data.corpus import Document
from fusejax.errors import InputError
from fusejax.io.tokenizer_rendered import encode_rendered, mask_encoded
from fusejax.io.tokenizers import EncodedDocument, Tokenizer


class DocumentEncoder:
    """A tokenizer that also reads what is trained.

    Args:
      tokenizer: of the model.
      template: of the model; None: conversations are refused.
    """

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate | None = None) -> None:
        self.tokenizer, self.template = tokenizer, template

    @property
    def fingerprint(self) -> str:
        """What determines the ids of a document."""
        return self.tokenizer.fingerprint + (f"+{self.template.fingerprint}" if self.template else "")

    def encode_batch(self, documents: Sequence[Document]) -> list[EncodedDocument]:
        """Encodes documents; of a masked one, `spans` is set and bytes count those that are trained.

        Raises:
          InputError: a conversation without a template or that the template cannot say, or nothing to train.
        """
        documents = list(documents)  # a corpus makes its documents anew at every look
        plain = iter(self.tokenizer.encode_batch([d.text for d in documents if not d.turns]))
        return [self._conversation(d) if d.turns else self._masked(d, next(plain)) for d in documents]

    def encode(self, document: Document) -> EncodedDocument:
        """Encodes one document; see `encode_batch`."""
        return self.encode_batch([document])[0]

    def _masked(self, document: Document, encoded: EncodedDocument) -> EncodedDocument:
        if document.spans is None:
            return encoded
        where = f"document {document.id!r}"
        return mask_encoded(self.tokenizer, encoded, document.text, document.spans, where=where)

    def _conversation(self, document: Document) -> EncodedDocument:
        where = f"document {document.id!r}"
        if self.template is None:
            raise InputError(f"{where} is a conversation; give the model a `chat_template`")
        text, contents, spans = self.template.render(document.messages, where=where)
        return encode_rendered(self.tokenizer, text, contents=contents, spans=spans, where=where)
