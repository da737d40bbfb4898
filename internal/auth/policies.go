package auth

import (
	"crypto/sha256"
	"fmt"
	"log/slog"
	"sync/atomic"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/certs"
	"github.com/push-manager/push-manager/internal/config"
	"github.com/push-manager/push-manager/internal/label"
	"github.com/push-manager/push-manager/internal/reload"
)

// ReadPolicy reads a policy file.
func ReadPolicy(path string) (*Policy, error) {
	text, err := config.ReadFile(path, maxPolicyFile)
	if err != nil {
		return nil, err
	}
	return parseFile(path, text)
}

func parseFile(path string, text []byte) (*Policy, error) {
	p, err := ParsePolicy(text)
	if err != nil {
		return nil, fmt.Errorf("%s: %w", path, err)
	}
	return p, nil
}

// PoliciesConfig says where a policy is. File is required.
type PoliciesConfig struct {
	File string
	// ReloadInterval is how often the file is read. 0 means that of certificates.
	ReloadInterval time.Duration
	// OnReload is called with each policy that replaces another one, before it is in use, and with what is wrong with
	// a file that is not taken over. nil: nobody is told.
	OnReload func(next *Policy, err error)

	Logger  *slog.Logger // nil: nothing is logged
	Metrics *metrics.Set // nil: a set of its own
}

// Policies is a policy that is kept up to date with its file.
type Policies struct {
	// Static after OpenPolicies.
	cfg           PoliciesConfig
	taken, failed *metrics.Counter
	loop          *reload.Loop

	current    atomic.Pointer[Policy]
	generation atomic.Uint64 // raised after current has changed

	// Owned by read.
	sum     [sha256.Size]byte // of the file that current is from
	trouble string            // what is wrong with the file, "" for nothing
}

// OpenPolicies reads the file, which must be right, and goes on to read it until Close.
func OpenPolicies(cfg PoliciesConfig) (*Policies, error) {
	if cfg.ReloadInterval == 0 {
		cfg.ReloadInterval = certs.DefaultReloadInterval
	}
	if cfg.Logger == nil {
		cfg.Logger = slog.New(slog.DiscardHandler)
	}
	if cfg.Metrics == nil {
		cfg.Metrics = metrics.NewSet()
	}
	if cfg.OnReload == nil {
		cfg.OnReload = func(*Policy, error) {}
	}
	text, err := config.ReadFile(cfg.File, maxPolicyFile)
	if err != nil {
		return nil, err
	}
	first, err := parseFile(cfg.File, text)
	if err != nil {
		return nil, err
	}
	p := &Policies{cfg: cfg, sum: sha256.Sum256(text)}
	reloads := func(result string) *metrics.Counter {
		return cfg.Metrics.GetOrCreateCounter(label.Name("push_manager_policy_reloads_total", "result", result))
	}
	p.taken, p.failed = reloads("ok"), reloads("failed")
	p.current.Store(first)
	cfg.Metrics.GetOrCreateGauge("push_manager_policy_callers", func() float64 { return float64(len(p.Current().callers)) })
	p.loop = reload.Start(cfg.ReloadInterval, p.read)
	return p, nil
}

// Current is the policy of this moment.
func (p *Policies) Current() *Policy { return p.current.Load() }

// Generation is raised whenever the policy has changed. What was found in it holds while the generation is the one that
// was read before Current.
func (p *Policies) Generation() uint64 { return p.generation.Load() }

// Reload has the file read soon. It does not wait.
func (p *Policies) Reload() { p.loop.Now() }

// Close ends the reading. The policy stays. It is called once.
func (p *Policies) Close() { p.loop.Close() }

// read takes over what the file holds, if that is another policy. It tells whether something is wrong that was not before.
// A file that has not changed is not parsed: one of 1 MiB takes a quarter of a second and 66 MB.
func (p *Policies) read() (worse bool) {
	text, err := config.ReadFile(p.cfg.File, maxPolicyFile)
	sum := sha256.Sum256(text)
	if err == nil && sum == p.sum {
		if p.trouble != "" {
			p.trouble = ""
			p.cfg.Logger.Info("policy file is as before")
		}
		return false
	}
	var next *Policy
	if err == nil {
		next, err = parseFile(p.cfg.File, text)
	}
	if err != nil {
		p.failed.Inc()
		if worse = err.Error() != p.trouble; worse {
			p.trouble = err.Error()
			p.cfg.Logger.Error("policy not taken over, the one before stays in use", "error", err)
			p.cfg.OnReload(nil, err)
		}
		return worse
	}
	p.trouble, p.sum = "", sum
	p.cfg.OnReload(next, nil)
	p.current.Store(next)
	p.generation.Add(1)
	p.taken.Inc()
	p.cfg.Logger.Info("policy taken over", "callers", len(next.callers), "tenants", len(next.tenants))
	return false
}
