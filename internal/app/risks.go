package app

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/config"
)

// AllowInsecureHelp is what allow_insecure does.
const AllowInsecureHelp = "Start although others could use what is not protected: an address that they reach without TLS and authentication, an etcd elsewhere without TLS. It is logged each hour."

// Risks are what is insecure about a program: its start is refused because of them, unless they are allowed.
type Risks struct {
	set     *config.Set
	allowed bool
	found   []string
}

// NewRisks has found none yet. allowed is the value of allow_insecure.
func NewRisks(s *config.Set, allowed bool) *Risks { return &Risks{set: s, allowed: allowed} }

// Add notes one, and refuses it unless it is allowed. The error names the key.
func (r *Risks) Add(key, format string, args ...any) error {
	text := fmt.Sprintf(format, args...)
	if !r.allowed {
		return r.set.Errorf(key, "%s: only with ALLOW_INSECURE=true", text)
	}
	r.found = append(r.found, text)
	return nil
}

// Listen is Add for listen_address where others can reach it while something is missing for that.
func (r *Risks) Listen(host, missing string) error {
	if err := CheckListen(r.set, "listen_address", host); err != nil {
		return err
	}
	if config.Loopback(host) || missing == "" {
		return nil
	}
	return r.Add("listen_address", "%q can be reached by others, without %s", host, missing)
}

// Asked notes one that a key of its own has asked for: it is allowed.
func (r *Risks) Asked(text string) { r.found = append(r.found, text) }

// Found are all.
func (r *Risks) Found() []string { return r.found }

// warnInsecure is how often it is said what is insecure.
const warnInsecure = time.Hour

// Insecure shows whether a program runs although something about it is insecure, and warns of that.
func (l *Lifecycle) Insecure(log *slog.Logger, set *metrics.Set, risks []string) {
	value := float64(min(len(risks), 1))
	set.GetOrCreateGauge("push_manager_insecure", func() float64 { return value })
	if len(risks) == 0 {
		return
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		for tick := time.NewTicker(warnInsecure); ; {
			log.Warn("this program is insecure, as its settings allow", "why", strings.Join(risks, "; "))
			select {
			case <-tick.C:
			case <-ctx.Done():
				tick.Stop()
				return
			}
		}
	}()
	l.Add("warning", Closing(func() {
		cancel()
		<-ended
	}))
}
