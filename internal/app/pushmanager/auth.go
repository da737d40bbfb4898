package pushmanager

import (
	"log/slog"
	"time"

	"github.com/VictoriaMetrics/metrics"

	"github.com/push-manager/push-manager/internal/app"
	"github.com/push-manager/push-manager/internal/auth"
	"github.com/push-manager/push-manager/internal/auth/apikey"
	"github.com/push-manager/push-manager/internal/auth/jwt"
	"github.com/push-manager/push-manager/internal/config"
)

// authConfig is the section auth: who may call the push API.
type authConfig struct {
	Mode         string
	PolicyFile   string
	KeysFile     string
	Tokens       jwt.Config
	CacheEntries int
}

func (c *authConfig) bind(s *config.Set) {
	s.Choice(&c.Mode, "auth.mode", "none", "Whether a caller of the push API must be one of the policy. With required and TLS the address may be one that others reach.", "none", "required")
	s.Text(&c.PolicyFile, "auth.policy_file", "", "YAML file of callers, what each may do, and tenants. It is read again while it changes.")
	s.Text(&c.KeysFile, "auth.api_keys_file", "", "File of API keys, as push-manager keys new writes it. It is read again while it changes.")
	c.Tokens.Bind(s, "auth.jwt")
	s.Int(&c.CacheEntries, "auth.cache_entries", auth.DefaultCacheEntries, 1, 1<<24, "Tokens and API keys that are known without being verified for each call, 400 bytes each.")
}

func (c *authConfig) on() bool { return c.Mode == "required" }

// validate reads the files. Keys that would have no effect are refused: whoever sets them believes that they have.
func (c *authConfig) validate(s *config.Set, certificates bool) error {
	if !c.on() {
		for _, key := range []struct {
			name string
			set  bool
		}{{"auth.policy_file", c.PolicyFile != ""}, {"auth.api_keys_file", c.KeysFile != ""}, {"auth.jwt", len(c.Tokens.Issuers) > 0}} {
			if key.set {
				return s.Errorf(key.name, "has no effect while auth.mode is none: set AUTH_MODE=required")
			}
		}
		return nil
	}
	if c.PolicyFile == "" {
		return s.Errorf("auth.policy_file", "missing, while auth.mode is required: nobody could call")
	}
	if !certificates && c.KeysFile == "" && len(c.Tokens.Issuers) == 0 {
		return s.Errorf("auth.mode", "required, and callers have no way to show who they are: set AUTH_API_KEYS_FILE, AUTH_JWT or TLS_CLIENT_CA_FILE")
	}
	if _, err := auth.ReadPolicy(c.PolicyFile); err != nil {
		return s.Errorf("auth.policy_file", "%v", err)
	}
	if c.KeysFile != "" {
		if err := apikey.Check(c.KeysFile); err != nil {
			return s.Errorf("auth.api_keys_file", "%v", err)
		}
	}
	if len(c.Tokens.Issuers) > 0 {
		return c.Tokens.Check(s, "auth.jwt")
	}
	return nil
}

// open opens the files and adds what reads them again. Without auth.mode=required it returns nil.
func (c *authConfig) open(life *app.Lifecycle, interval time.Duration, log *slog.Logger, set *metrics.Set) (*auth.Authenticator, error) {
	if !c.on() {
		return nil, nil //nolint:nilnil // Nobody is asked.
	}
	policies, err := auth.OpenPolicies(auth.PoliciesConfig{File: c.PolicyFile, ReloadInterval: interval, Logger: log, Metrics: set})
	if err != nil {
		return nil, err
	}
	life.AddFiles("policy", policies)
	cfg := auth.Config{Policies: policies, CacheEntries: c.CacheEntries, Metrics: set}
	if c.KeysFile != "" {
		if cfg.Keys, err = apikey.Open(apikey.Config{File: c.KeysFile, ReloadInterval: interval, Logger: log, Metrics: set}); err != nil {
			return nil, err
		}
		life.AddFiles("API keys", cfg.Keys)
	}
	if len(c.Tokens.Issuers) > 0 {
		c.Tokens.ReloadInterval, c.Tokens.Logger, c.Tokens.Metrics = interval, log, set
		if cfg.Tokens, err = jwt.New(c.Tokens); err != nil {
			return nil, err
		}
		life.AddFiles("issuers of tokens", cfg.Tokens)
	}
	return auth.New(cfg)
}
