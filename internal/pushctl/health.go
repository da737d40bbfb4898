package pushctl

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strings"
	"time"

	"github.com/push-manager/push-manager/internal/plain"
)

type healthCmd struct {
	URL     string        `arg:"" optional:"" name:"url" default:"http://127.0.0.1:9093/readyz" help:"/readyz or /healthz on the metrics port of a program. Default: ${default}."`
	Timeout time.Duration `default:"2s" help:"Longest wait for the answer."`
}

// maxHealth bounds what is read of an answer, and shown of it.
const maxHealth = 4 << 10

// Run asks a program how it is: what a container has for its health check, in which there is no curl. Exit code 0 is status
// 200, anything else is 1.
func (c *healthCmd) Run(ctx context.Context, t *terminal) error {
	if c.Timeout <= 0 || c.Timeout > maxTimeout {
		return &usageError{fmt.Sprintf("--timeout: %v must be above zero and at most %v", c.Timeout, maxTimeout)}
	}
	target, err := url.Parse(c.URL)
	if err != nil || target.Scheme != "http" || target.Host == "" {
		return &usageError{fmt.Sprintf("url: %q must be http://HOST:PORT/PATH", c.URL)}
	}
	ctx, cancel := context.WithTimeout(ctx, c.Timeout)
	defer cancel()
	request, err := http.NewRequestWithContext(ctx, http.MethodGet, target.String(), http.NoBody)
	if err != nil {
		return &usageError{"url: " + err.Error()}
	}
	// No proxy of the environment: it is this program that is asked.
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response, err := client.Do(request)
	if err != nil {
		return fmt.Errorf("no answer: %w", err)
	}
	defer func() { _ = response.Body.Close() }() // nothing was written
	body, err := io.ReadAll(io.LimitReader(response.Body, maxHealth))
	if err != nil {
		return fmt.Errorf("%s, and then: %w", response.Status, err)
	}
	text := plain.Line(strings.TrimSpace(string(body)), maxHealth)
	err = t.answer(struct {
		Status int    `json:"status"`
		Text   string `json:"text"`
	}{response.StatusCode, text}, fmt.Sprintf("%d %s", response.StatusCode, text))
	if response.StatusCode != http.StatusOK {
		return errors.Join(err, &outcome{code: exitError})
	}
	return err
}
