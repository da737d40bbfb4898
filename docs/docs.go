// Package docs holds the documentation that programs carry in themselves.
//
// It is for Push-Manager itself: its API changes without notice.
package docs

import _ "embed" // for the files below

// Metrics is metrics.md. Its tables are where the HELP and TYPE of each metric stand.
//
//go:embed metrics.md
var Metrics string

// OpenAPI is openapi.yaml, which describes the push API over HTTP.
//
//go:embed openapi.yaml
var OpenAPI []byte
