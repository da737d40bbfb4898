package pushctl

import (
	"fmt"
	"time"

	"github.com/push-manager/push-manager/internal/auth/jwt"
)

type tokenCmd struct {
	User       string        `arg:"" help:"The user that the token is for: its claim sub."`
	SecretFile string        `required:"" placeholder:"FILE" help:"The hs_secret_file of the issuer. Only its owner and group may be able to read it."`
	Issuer     string        `required:"" help:"The issuer, as in client_auth.jwt."`
	Audience   string        `required:"" help:"Its audience."`
	Name       string        `help:"Name of the user."`
	Tenant     string        `help:"Tenant of the user."`
	Room       []string      `sep:"none" help:"Room that the user may be in, may be repeated; a star at the end stands for any rest. Default: all."`
	Valid      time.Duration `default:"1h" help:"How long the token is good, 24h at most."`
	Out        string        `placeholder:"FILE" help:"Write the token to this file, in one go, in place of standard output."`
}

// Run makes a token for a WebSocket client. It is for development: in production the service that knows the users makes
// them.
func (c *tokenCmd) Run(t *terminal) error {
	if c.Valid <= 0 || c.Valid > 24*time.Hour {
		return &usageError{fmt.Sprintf("--valid: %v must be above zero and at most 24h", c.Valid)}
	}
	secret, err := jwt.ReadSecret(c.SecretFile)
	if err != nil {
		return &usageError{fmt.Sprintf("--secret-file: %v", err)}
	}
	now := time.Now()
	claims := map[string]any{"iss": c.Issuer, "aud": c.Audience, "sub": c.User, "iat": now.Unix(), "exp": now.Add(c.Valid).Unix()}
	for claim, value := range map[string]string{"name": c.Name, "tenant": c.Tenant} {
		if value != "" {
			claims[claim] = value
		}
	}
	if len(c.Room) > 0 {
		claims["rooms"] = c.Room
	}
	token, err := jwt.Mint(secret, claims)
	if err != nil {
		return err
	}
	if c.Out == "" {
		return t.answer(struct {
			Token   string    `json:"token"`
			Expires time.Time `json:"expires"`
		}{token, now.Add(c.Valid).UTC().Truncate(time.Second)}, token)
	}
	if err = replaceFile(c.Out, []byte(token+"\n")); err != nil {
		return fmt.Errorf("write the token: %w", err)
	}
	return nil
}
