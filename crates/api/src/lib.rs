//! OpenAI wire types, the Backend trait and an HTTP client for it.
