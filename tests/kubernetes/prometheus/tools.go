//go:build tools

// Package tools names the command that build compiles, so that go.mod pins it.
package tools

import _ "github.com/prometheus/prometheus/cmd/prometheus"
