"""Credentials in texts that are shown, logged or stored; texts without any stay as they are."""

import pytest

from dama.redact import redacted
from tests.growth import growth

pytestmark = pytest.mark.fast

SECRETS = [
    "http://user:S3CRET@host:8000/v1/models", "https://S3CRET@host/v1", "https://user:S3C@S3CRET@host/v1",
    "HTTP://:S3CRET@host", "server 'https://u:S3CRET@h/v1': refused", "//user:S3CRET@host/x", "http:/u:S3CRET@h",
    "Authorization: Bearer S3CRET", "authorization=S3CRET", "{'Authorization': 'Bearer S3CRET'}",
    '{"headers": {"authorization": "Basic UzNDUkVUS3CRET=="}}', "Proxy-Authorization: Digest a=S3CRET, b=S3CRET",
    "got header bearer S3CRETS3CRET", "Basic dXNlcjpwYXNz", r'{\"api_key\": \"S3CRET\"}', "?api_key=S3CRET&x=1",
    "OPENAI_API_KEY=S3CRET", "x-api-key: S3CRET", "&token=S3CRET", "hf_token: S3CRET", "password: 'two S3CRET'",
    '"client_secret":"S3CRET"', "--password S3CRET", "--api-key S3CRET", "Cookie: a=S3CRET; b=S3CRET",
    "X-Amz-Signature=S3CRET", "Incorrect API key provided: sk-proj-S3CRETS3CRET", "key sk_live_S3CRETS3CRET rejected",
    "hf_S3CRETS3CRETS3", "ghp_S3CRETS3CRETS3CRETS3CRET", "AIzaS3CRETS3CRETS3CRETS3CRET", "AKIAS3CRETS3CRETS3",
    "eyJhbGciS3CRET.eyJzdWIS3CRET.S3CRET", "ApiKey='S3CRET'", "API key: S3CRET",
    # Quoted parameters, lists, markup, encodings, and addresses without a scheme.
    'Authorization: Digest username="ann", response="S3CRET"', "Proxy-Authorization: Digest a='b', nonce='S3CRET'",
    'Authorization: Token token="S3CRET"', 'Set-Cookie: a="S3CRET"; Path=/', "[('authorization', 'S3CRET')]",
    "(b'x-api-key', b'S3CRET')", '{"Authorization": ["Bearer", "S3CRET"]}', "{'api_key': ('S3CRET',)}",
    "{&quot;api_key&quot;: &quot;S3CRET&quot;}", "Authorization&#58; S3CRET", "api_key%3DS3CRET&x=1",
    "http%3A%2F%2Fuser%3AS3CRET%40host", "Failed to resolve 'user:S3CRET@host'", "no route to user:S3CRET@10.0.0.1:80",
    "<td>Authorization</td><td>S3CRET</td>", "<Authorization>S3CRET</Authorization>", "password => 'S3CRET'",
    "SECRET_KEY=S3CRET", "private_key: S3CRET", "Ocp-Apim-Subscription-Key: S3CRET", "AccountKey=S3CRET;",
    "passphrase: S3CRET", "accessToken: S3CRET", "JSESSIONID=S3CRET", "X-Auth: S3CRET", "api_key:          S3CRET",
    "curl -u user:S3CRET http://h", "Bearer 'S3CRETS3CRET'", "glpat-S3CRETS3CRETS3CRET", "npm_S3CRETS3CRETS3CRETS3",
    "-----BEGIN RSA PRIVATE KEY-----\nS3CRET\nS3CRET\n-----END RSA PRIVATE KEY-----",
]  # fmt: skip


@pytest.mark.parametrize("text", SECRETS)
def test_a_secret_is_gone(text):
    said = redacted(text)
    assert "S3CRET" not in said and "dXNlcjpwYXNz" not in said and "[redacted]" in said
    assert redacted(said) == said


@pytest.mark.parametrize("text", [
    "http://127.0.0.1:8000/v1", "see https://a.b/c@d and mail a@b.c", "max_tokens: 512, 3 tokens, token ids: 7",
    "a bearer of bad news", "Basic instructions", "[redacted]", "status 404 for 'm': no such model", "",
    "row 7: the answer is empty", "file:///tmp/a.png", "secretary: Ann", "tokenizer: llama", "sk-1",
    "mailto:ann@b.c", "12:30@noon", "columns ['token', 'text']", "a <b>secret</b> garden", "primaryKey: id",
])  # fmt: skip
def test_other_texts_stay(text):
    assert redacted(text) == text


def test_what_stands_around_a_secret_stays():
    assert redacted("GET http://u:p@h:1/v1?x=1 failed") == "GET http://[redacted]@h:1/v1?x=1 failed"
    assert redacted('{"token": "abc", "n": 1}') == '{"token": "[redacted]", "n": 1}'


def test_the_keys_of_this_process(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "correct horse")
    monkeypatch.setenv("HF_TOKEN", "none")
    assert redacted("bad key correct horse, none left") == "bad key [redacted], none left"


@pytest.mark.parametrize(
    "part",
    [
        "a_",
        "http:",
        "a:/",
        "token ",
        "bearer ",
        "sk-",
        "authorization:'",
        '\\"',
        "eyJa.",
        "a=b,",
        "cookie:a=",
        "user:a",
        "api_key:[",
        "password>",
        "%3a%2f",
        "-u a:",
    ],
)
def test_a_long_text_takes_no_long(part):
    assert growth(redacted, part) < 80
